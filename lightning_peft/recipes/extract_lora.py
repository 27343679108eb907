"""extract_lora: an adapter from a fully fine-tuned model, layer by layer.

ΔW = W_tuned − W_base ≈ B A, the best approximation of rank r (Eckart–Young). One layer's weights
are held at a time besides the factors. Example inputs, where given, fit the factors further.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.detach import detach
from lightning_peft.adapters.plan import plan_attach
from lightning_peft.core.names import join
from lightning_peft.core.site import Site
from lightning_peft.core.value_types import require_fit, shown
from lightning_peft.hf.save import save_adapter
from lightning_peft.hf.skeleton import skeleton
from lightning_peft.hf.targets import exact_targets
from lightning_peft.layers.adapted import adapted_modules, adapters_of, weight_adapters_of
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.lora import LoRA
from lightning_peft.models.outputs import output_of, relative_change
from lightning_peft.recipes.extract_report import ExtractedLayer, ExtractReport
from lightning_peft.recipes.fit_outputs import Goal, fit_outputs, goals_of
from lightning_peft.recipes.svd import factors, kept_energy
from lightning_peft.recipes.weight_source import Weight, opened

__all__ = ["extract_lora"]


def extract_lora(
    base: nn.Module | str | Path,
    tuned: nn.Module | str | Path,
    r: int,
    *,
    target_modules: str | list[str] | None = "all-linear",
    exclude_modules: str | list[str] | None = None,
    modules_to_save: Sequence[str] = (),
    bias: Literal["none", "all", "lora_only"] = "none",
    adapter_name: str = "default",
    directory: str | Path | None = None,
    batch: object = None,
    inputs: Iterable[Any] | None = None,
) -> ExtractReport:
    """Attach the LoRA adapter to `base` that approximates `tuned` best, in place.

    Args:
        base: The model that fine-tuning started from. It may be quantised, then the adapter makes
            up for that too. Or a directory of transformers' (config.json and .safetensors): nothing
            is loaded then, and the adapter goes to `directory` alone.
        tuned: The fine-tuned model, or a .safetensors file of its weights, or a directory with one
            or several; names are those of `base`, apart from what stands before all of them.
        r: Rank; layers that are smaller get the rank they can have.
        target_modules: As in LoRA; ``"all-linear"`` leaves the output head out.
        exclude_modules: As in LoRA.
        modules_to_save: Modules copied whole (a classification head).
        bias: Biases copied: of all layers, of the adapted ones, or none.
        adapter_name: Name to attach under.
        directory: Where to write a Hugging Face peft adapter too.
        batch: An example input (tensor, tuple or dict) on which the output is compared with the
            tuned model's.
        inputs: Example inputs without labels, each like `batch`, all kept in memory with their
            outputs: the factors, first those of the singular values, are fitted to the tuned
            model's outputs on them, in four passes. Some hundred rows of the task bring the score
            nearer; without them only the weights are looked at.

    Returns:
        Energy kept by layer, what was left out, and the error.

    Raises:
        FileNotFoundError: no weights there.
        TypeError: a model that is neither a module nor a path, or a rank that is no whole number.
        ValueError: r < 1, a pickle, a weight that is missing, misshapen or not finite; `base` is as
            before.
    """
    _check_types(base, tuned, r)
    _check_arguments(base, r, directory, runs=batch is not None or inputs is not None)
    model = base if isinstance(base, nn.Module) else skeleton(Path(base))
    method = LoRA(
        r=1, alpha=1.0, bias=bias, target_modules=target_modules, exclude_modules=exclude_modules
    )
    planned = plan_attach(model, [method], []).adapters  # finds the sites; changes nothing
    sites = [p.placement.site for p in planned if p.method is method]
    report = ExtractReport()
    with opened(base) as before, opened(tuned) as after:
        wanted = [join(s.name, s.parameter) for s in sites]
        pair = _Pair(
            before.under_names_of(model, wanted),
            after.under_names_of(model, wanted),
            isinstance(base, nn.Module),
        )
        pair.check_shapes(sites, after.label)
        goals = _Goals.of(model, tuned, pair, batch, inputs)
        found = {
            (id(s.module), s.parameter): _factored(s, pair, min(r, *s.shape[-2:]), report)
            for s in sites
        }
        report.attached = attach(
            model,
            _with_ranks(method, model, r, sites, found),
            adapter_name=adapter_name,
            modules_to_save=modules_to_save,
        )
        try:
            covered = _fill(model, adapter_name, found, pair)
        except ValueError:
            detach(model, adapter_name)
            raise
        report.left_out = _left_out(pair, covered | set(wanted))
    goals.reach(model, adapter_name, report)
    if directory is not None:
        save_adapter(model, directory, adapter_name=adapter_name)
    return report


def _check_types(base: object, tuned: object, r: object) -> None:
    """Raise TypeError for a model or a rank of another type."""
    for name, source in (("base", base), ("tuned", tuned)):
        if not isinstance(source, nn.Module | str | Path):
            raise TypeError(
                f"extract_lora {name}: expected a model, or a path to its weights, got "
                f"{shown(source)}"
            )
    require_fit("extract_lora", "r", r, int, "r=16")


def _check_arguments(
    base: nn.Module | str | Path, r: int, directory: str | Path | None, *, runs: bool
) -> None:
    """Check the rank, and that a base on the meta device is never run.

    Raises:
        ValueError: r < 1; a directory as base without `directory`, or with something to run.
    """
    if r < 1:
        raise ValueError(f"extract_lora: expected a rank r >= 1, got {r}")
    if not isinstance(base, nn.Module) and (directory is None or runs):
        raise ValueError(
            "extract_lora: expected directory= and no batch or inputs with a base that is not "
            f"loaded, got directory = {directory} and {'something' if runs else 'nothing'} to run"
        )


#: (id of the module, weight) → (A, B).
_Found = Mapping[tuple[int, str], tuple[Tensor, Tensor]]


def _with_ranks(
    method: LoRA, model: nn.Module, r: int, sites: Sequence[Site], found: _Found
) -> LoRA:
    """Return the method for exactly these sites, with each layer's rank and scale 1."""
    ranks = {s.name: found[id(s.module), s.parameter][0].shape[-2] for s in sites}
    return dataclasses.replace(
        method,
        r=r,
        alpha=float(r),
        rank_pattern={re.escape(n): k for n, k in ranks.items() if k != r},
        alpha_pattern={re.escape(n): float(k) for n, k in ranks.items() if k != r},
        target_modules=exact_targets(model, sites),
        exclude_modules=None,
    )


@dataclass(frozen=True)
class _Goals:
    """Outputs of both models, computed before the adapter is attached.

    Attributes:
        batch: The example input to compare on, None without one.
        outputs: The base's and the tuned model's output on the batch.
        fitted: The tuned model's outputs on the inputs to fit to.
    """

    batch: object
    outputs: tuple[Tensor, Tensor] | None
    fitted: Sequence[Goal] | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tuned: nn.Module | str | Path,
        pair: _Pair,
        batch: object,
        inputs: Iterable[Any] | None,
    ) -> _Goals:
        """Run both models on the batch, and the tuned one on the inputs."""
        if batch is None and inputs is None:
            return cls(None, None, None)
        runner = _runner(model, tuned, pair)
        outputs = None if batch is None else (output_of(model, batch), output_of(runner, batch))
        return cls(batch, outputs, None if inputs is None else goals_of(runner, inputs))

    def reach(self, model: nn.Module, adapter_name: str, report: ExtractReport) -> None:
        """Fit the factors to the inputs, and report the error on the batch."""
        if self.fitted is not None:
            report.fitted = fit_outputs(model, _factors_in(model, adapter_name), self.fitted)
        if self.outputs is not None:
            report.output_change = relative_change(*self.outputs)
            report.output_error = relative_change(output_of(model, self.batch), self.outputs[1])


@dataclass(frozen=True)
class _Pair:
    """Yield the weights of both models by the base's parameter names."""

    base: Mapping[str, Weight]
    tuned: Mapping[str, Weight]
    in_memory: bool

    def check_shapes(self, sites: Sequence[Site], label: str) -> None:
        problems = []
        for s in sites:
            name = join(s.name, s.parameter)
            shape, got = s.storage.shape(s.module, s.parameter), self.tuned[name].shape
            if tuple(shape) != got:
                problems.append(f"{name}: expected shape {list(shape)}, got {list(got)}")
        if problems:
            raise ValueError(f"{label}: nothing was changed:\n  " + "\n  ".join(problems[:20]))

    def matrices(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the canonical weights in fp32, before and after fine-tuning."""
        name = join(site.name, site.parameter)

        def canonical(W: Tensor) -> Tensor:
            return site.ops.to_canonical(site.module, site.parameter, W.float())

        W = site.weight(torch.float32) if self.in_memory else canonical(self.base[name].read())
        return W, canonical(self.tuned[name].read()).to(W.device)


def _factored(site: Site, pair: _Pair, r: int, report: ExtractReport) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        W, new = pair.matrices(site)
        delta = new - W
        if not delta.isfinite().all():
            raise ValueError(
                f"extract_lora: {site.quoted}: expected finite weights, got NaN or infinity"
            )
        A, B = factors(delta, r)
        energy = kept_energy(delta, A, B)
        change = relative_change(new, W)
    report.layers.append(ExtractedLayer(site.label, A.shape[-2], energy, change))
    return A.cpu(), B.cpu()


def _fill(model: nn.Module, adapter_name: str, found: _Found, pair: _Pair) -> set[str]:
    """Store factors and copies in the model; a model on meta gets tensors on the CPU."""
    covered: set[str] = set()
    for name, module in adapted_modules(model):
        for adapter in adapters_of(module, adapter_name):
            values: dict[str, Tensor] = {}
            if isinstance(adapter, WeightAdapter):
                A, B = found[id(module), adapter.site.parameter]
                values = {"A": A, "B": B}
            for key, path in adapter.paths.items() if isinstance(adapter, CopyAdapter) else ():
                full = join(name, path)
                if full not in pair.tuned:
                    raise ValueError(
                        f"extract_lora: {full!r}: expected a tensor of that name in the tuned "
                        "model, found none; leave it out of modules_to_save"
                    )
                values[key] = pair.tuned[full].read()
                covered.add(full)
            with torch.no_grad():
                for key, value in values.items():
                    tensor = adapter.get_parameter(key)
                    if tensor.device.type == "meta":
                        adapter._parameters[key] = nn.Parameter(value.to(tensor.dtype).clone())
                    else:
                        tensor.copy_(value)
    return covered


def _left_out(pair: _Pair, covered: set[str]) -> list[tuple[str, float]]:
    left: list[tuple[str, float]] = []
    for name in sorted(set(pair.base) & set(pair.tuned) - covered):
        old, new = pair.base[name].read().float(), pair.tuned[name].read().float()
        if old.shape != new.shape:
            left.append((name, float("inf")))
        elif not torch.equal(old.cpu(), new.cpu()):
            left.append((name, relative_change(new.cpu(), old.cpu())))
    return sorted(left, key=lambda item: -item[1])


class _Under(nn.Module):
    """Runs a model under other weights and leaves its own unchanged."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.state = state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.state, args, kwargs)


def _runner(model: nn.Module, tuned: nn.Module | str | Path, pair: _Pair) -> nn.Module:
    """Return a callable that runs the tuned model."""
    if isinstance(tuned, nn.Module):
        return tuned
    own = dict(model.named_parameters())
    packed = [n for n in pair.tuned if n in own and not own[n].is_floating_point()]
    if packed:
        raise ValueError(
            f"extract_lora: expected a dense base to run the tuned weights in, got packed "
            f"{packed[:2]}; give the tuned model itself, or neither batch nor inputs"
        )
    return _Under(model, {n: w.read().to(own[n]) for n, w in pair.tuned.items() if n in own})


def _factors_in(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    adapters = [a for _, m in adapted_modules(model) for a in weight_adapters_of(m, adapter_name)]
    return [a.get_parameter(name) for a in adapters for name in ("A", "B")]
