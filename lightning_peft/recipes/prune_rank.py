"""prune_rank: reduces the rank of a trained LoRA adapter by the singular values of its change."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_peft.adapters.activation import activate, disable_adapters
from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.detach import detach
from lightning_peft.core.registry import AdapterRegistry, registries_in, registry_of
from lightning_peft.core.site import Site
from lightning_peft.hf.targets import exact_targets
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.formats import lora as lora_format
from lightning_peft.methods.lora import LoRA
from lightning_peft.models.outputs import output_of, relative_change
from lightning_peft.recipes.svd import balanced, rank_for, thin_svd

__all__ = ["PruneReport", "PrunedLayer", "prune_rank"]


@dataclass(frozen=True)
class PrunedLayer:
    """Result for one weight.

    Attributes:
        name: The weight.
        rank: Before.
        kept: After.
        energy: Share of Σσ² of its change that is kept.
    """

    name: str
    rank: int
    kept: int
    energy: float


@dataclass
class PruneReport:
    """Ranks and energy that pruning removed.

    Attributes:
        layers: One entry a weight.
        parameters: Trained elements of the adapter, before and after.
        output_error: ‖after − before‖ / ‖before‖ of the output on the batch given; None without
            one.
        output_change: ‖before − base‖ / ‖base‖: what the adapter is worth on that batch.
    """

    layers: list[PrunedLayer] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    output_error: float | None = None
    output_change: float | None = None

    @property
    def energy(self) -> float:
        """Return the smallest share kept by any layer."""
        return min((e.energy for e in self.layers), default=1.0)

    def __str__(self) -> str:
        """Return ranks, parameters and the error of the output as text."""
        before, after = self.parameters
        ranks = sorted(Counter(e.kept for e in self.layers).items())
        text = ", ".join(f"rank {k} in {n}" for k, n in ranks)
        lines = [
            f"{len(self.layers)} layers ({text}), {before:,} → {after:,} parameters, at least "
            f"{self.energy:.2%} of the energy of a layer kept"
        ]
        if self.output_error is not None:
            lines.append(
                f"output on the batch differs by {self.output_error:.2e} (relative); the adapter "
                f"itself changes it by {self.output_change:.2e}"
            )
        return "\n".join(lines)


#: (id of the module, path in it).
_Key = tuple[int, str]


@dataclass
class _Cut:
    """New factors of one weight, and the adapter's other tensors."""

    site: Site
    A: Tensor
    B: Tensor
    others: dict[str, Tensor]


def prune_rank(
    model: nn.Module,
    *,
    energy: float | None = None,
    rank: int | None = None,
    adapter_name: str = "default",
    batch: object = None,
) -> PruneReport:
    """Replace an adapter by its best approximation of smaller rank, in place.

    The change s·BA of each layer is decomposed exactly from QR of B and of Aᵀ; it is never formed.
    The new adapter has scale 1 and default start; starts that took their part out of the base
    (PiSSA, OLoRA, LoftQ) end as plain adapters of the original base. Meant for after training:
    an optimizer made before holds the old tensors.

    Args:
        model: A model with a LoRA or DoRA adapter.
        energy: Share of Σσ² that every layer keeps, in (0, 1]; the ranks differ by layer then.
        rank: The largest rank of a layer; with `energy`, both hold.
        adapter_name: Which adapter.
        batch: An example input (tensor, tuple or dict) on which the error of the output is
            measured.

    Returns:
        Ranks, energies and the error.

    Raises:
        KeyError: no adapter of that name.
        ValueError: neither `energy` nor `rank`, or out of range; an adapter that is not LoRA's.
        RuntimeError: the adapter is merged.
    """
    if energy is None and rank is None:
        raise ValueError("prune_rank: expected energy= or rank=, got neither")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"prune_rank: energy: expected 0 < energy <= 1, got {energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"prune_rank: rank: expected rank >= 1, got {rank}")
    root, record, method = _adapter(model, adapter_name)
    report = PruneReport()
    before = None
    if batch is not None:
        before = output_of(model, batch)
        with disable_adapters(model):
            report.output_change = relative_change(before, output_of(model, batch))
    cuts, copies = _cuts(root, adapter_name, energy, rank, report)
    size, active = _size(root, adapter_name), list(record.active)
    saved = record.adapters[adapter_name].modules_to_save
    new_method = _pruned(root, method, cuts)
    detach(root, adapter_name)
    attach(root, new_method, adapter_name=adapter_name, modules_to_save=saved)
    _restore(root, adapter_name, cuts, copies)
    new = registry_of(root)
    assert new is not None  # attach made it
    activate(root, new, active)
    report.parameters = (size, _size(root, adapter_name))
    if before is not None:
        report.output_error = relative_change(output_of(model, batch), before)
    return report


def _adapter(model: nn.Module, name: str) -> tuple[nn.Module, AdapterRegistry, LoRA]:
    """Return the adapter's places and its method. All checks are made here."""
    found = [(root, r) for _, root, r in registries_in(model) if name in r.adapters]
    known = sorted({n for _, _, r in registries_in(model) for n in r.adapters})
    if len(found) != 1:
        raise KeyError(f"prune_rank: expected one of the attached adapters {known}, got {name!r}")
    root, record = found[0]
    methods = record.adapters[name].methods
    if len(methods) != 1 or not isinstance(methods[0], LoRA):
        raise ValueError(
            f"prune_rank: expected an adapter of LoRA or a kind of it, got "
            f"{[m.label for m in methods]}, whose change has no rank to prune"
        )
    for label, module in adapted_modules(root):
        merged = module._peft.active.merged
        if merged:
            raise RuntimeError(
                f"prune_rank {label!r}: expected unmerged adapters, found {merged}; unmerge first"
            )
    return root, record, methods[0]


def _size(root: nn.Module, name: str) -> int:
    return sum(
        p.numel()
        for _, module in adapted_modules(root)
        for adapter in adapters_of(module, name)
        for p in adapter.parameters()
    )


def _cuts(
    root: nn.Module, name: str, energy: float | None, rank: int | None, report: PruneReport
) -> tuple[dict[_Key, _Cut], dict[_Key, Tensor]]:
    """Return new factors by weight, and the values of trained copies, on the CPU."""
    cuts: dict[_Key, _Cut] = {}
    copies: dict[_Key, Tensor] = {}
    with torch.no_grad():
        for _, module in adapted_modules(root):
            weights = []
            for adapter in adapters_of(module, name):
                for path, value in adapter.copies().items():
                    copies[id(module), path] = value.detach().cpu().clone()
                if isinstance(adapter, WeightAdapter):
                    weights.append((adapter, _decomposed(adapter)))
            # A pattern knows modules only: all weights of one have one rank.
            kept = max((_kept(S, energy, rank) for _, (_, S, _) in weights), default=0)
            for adapter, spectrum in weights:
                key = (id(module), adapter.site.parameter)
                cuts[key] = _cut(adapter, spectrum, kept, report)
    return cuts, copies


_Spectrum = tuple[Tensor, Tensor, Tensor]  # U [*, out, k], S [*, k], Vh [*, k, in]


def _lora(adapter: WeightAdapter) -> LoRA:
    """Return the adapter's method, which `_adapter` has checked."""
    assert isinstance(adapter.method, LoRA)
    return adapter.method


def _decomposed(adapter: WeightAdapter) -> _Spectrum:
    own, method = adapter.tensors(), _lora(adapter)
    s = method.scaling(adapter.site, own["A"].shape[-2])
    plain = lora_format.pack(method, adapter.site, own)
    return thin_svd(plain["A"].double(), s * plain["B"].double())


def _kept(S: Tensor, energy: float | None, rank: int | None) -> int:
    most = S.shape[-1] if energy is None else rank_for(S, energy)
    return most if rank is None else min(most, rank)


def _cut(adapter: WeightAdapter, spectrum: _Spectrum, k: int, report: PruneReport) -> _Cut:
    own, site = adapter.tensors(), adapter.site
    U, S, Vh = spectrum
    squares = S.square()
    total = float(squares.sum())
    share = 1.0 if total == 0 else float(squares[..., :k].sum()) / total
    A, B = balanced(U, S, Vh, k)
    others = {n: t.detach().cpu().clone() for n, t in own.items() if n not in _FACTORS}
    r = own["A"].shape[-2]
    if "bias_B" in others:
        others["bias_B"] = _lora(adapter).scaling(site, r) * others["bias_B"]
    report.layers.append(PrunedLayer(site.label, r, k, share))
    return _Cut(site, A.float().cpu(), B.float().cpu(), others)


_FACTORS = ("A", "B", "A0", "B0")


def _pruned(root: nn.Module, method: LoRA, cuts: dict[_Key, _Cut]) -> LoRA:
    """Return the method with the new ranks and scale 1, for exactly these layers."""
    ranks = {c.site.name: c.A.shape[-2] for c in cuts.values()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Longest names first: a pattern also matches names that end in it.
    odd = sorted((n for n, r in ranks.items() if r != usual), key=lambda n: (-len(n), n))
    return dataclasses.replace(
        method,
        r=usual,
        alpha=float(usual),
        rank_pattern={re.escape(n): ranks[n] for n in odd},
        alpha_pattern={re.escape(n): float(ranks[n]) for n in odd},
        use_rslora=False,
        init="default",
        init_options={},
        target_modules=exact_targets(root, [c.site for c in cuts.values()]),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _restore(
    root: nn.Module, name: str, cuts: dict[_Key, _Cut], copies: dict[_Key, Tensor]
) -> None:
    with torch.no_grad():
        for _, module in adapted_modules(root):
            for adapter in adapters_of(module, name):
                for path, value in adapter.copies().items():
                    value.copy_(copies[id(module), path])
                if isinstance(adapter, WeightAdapter):
                    cut = cuts[id(module), adapter.site.parameter]
                    for key, tensor in adapter.tensors().items():
                        tensor.copy_({"A": cut.A, "B": cut.B, **cut.others}[key])
