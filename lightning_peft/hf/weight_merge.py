"""Merges an adapter into weights that are read from files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_peft.adapters.merge_plan import ModuleMerge
from lightning_peft.adapters.quantize import plan_quantization
from lightning_peft.core.edit import apply_edits
from lightning_peft.core.modules import tied_parameters
from lightning_peft.core.names import in_adapter
from lightning_peft.core.registry import registries_in
from lightning_peft.core.site import Site
from lightning_peft.hf.joined_files import ExpertPart, JoinedFiles
from lightning_peft.hf.parameter_change import ParameterChange, parameter_changes
from lightning_peft.hf.provenance import Provenance
from lightning_peft.layers import ops_for
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.models.fingerprint import sampled_hash
from lightning_peft.storage import StorageConfig, storage_for

__all__ = ["MergeError", "WeightMerger"]


@dataclass
class MergeError:
    """‖W_out − (W_trained + Δ)‖ / ‖Δ‖ over several weights.

    Attributes:
        wrong: Sum of squares of W_out − (W_trained + Δ).
        change: Sum of squares of Δ.
    """

    wrong: float = 0.0
    change: float = 0.0

    def add(self, written: Tensor, wanted: Tensor, change: float) -> None:
        """Count one weight."""
        self.wrong += float(torch.linalg.vector_norm(written - wanted)) ** 2
        self.change += change

    @property
    def relative(self) -> float:
        """The quotient; 0 for an adapter that changes nothing."""
        return (self.wrong / self.change) ** 0.5 if self.change else 0.0


class WeightMerger:
    """Forms the merged value of each stored tensor.

    Args:
        model: The model without weights, with the adapter.
        files: The base.
        names: Parameter → its name in the files.
        plan: The plan of the merge.
        provenance: What the adapter was trained on.
        quantization: How the base was quantised in training; None for dense.
        onto: ``"trained"`` or ``"original"``.
        dtype: Dtype of the result; None for the base's.

    Attributes:
        changes: What the adapter does, by parameter.
        untied: Whether a tied parameter gets values of its own.
        error: Error by base.

    Raises:
        ValueError: an adapted parameter is not in the files.
    """

    def __init__(
        self,
        model: nn.Module,
        files: JoinedFiles,
        names: Mapping[str, str],
        plan: Sequence[ModuleMerge],
        provenance: Provenance,
        quantization: StorageConfig | None,
        onto: str,
        dtype: torch.dtype | None,
    ) -> None:
        self._files, self._names, self._provenance = files, names, provenance
        self._quantization, self._onto, self._dtype = quantization, onto, dtype
        self._modules = dict(model.named_modules())
        self._packed = _packed_weights(model, quantization)
        self._ties = _ties(model)
        self.changes = parameter_changes(plan)
        self._fused: dict[str, tuple[Tensor, int]] = {}
        self.error = {"trained": MergeError(), "original": MergeError()}
        missing = sorted(name for name in self.changes if self._stored(name) not in files.tensors)
        if missing:
            raise ValueError(
                f"{files.directory}: expected the adapted weights under the model's names, found "
                f"none for {missing[:3]} and {max(0, len(missing) - 3)} more (files may hold "
                "weights in another form); load the model with from_pretrained and the adapter "
                "with load_adapter, then merge_and_unload and save_pretrained"
            )
        self.untied = [group for group in self._ties if self._comes_apart(group)]

    # ---- which tensors

    def former(self, key: str) -> Callable[[], Tensor]:
        """Return how to form the tensor that is stored under `key`."""
        if key in self._files.fused:
            fused, part = self._files.fused[key]
            if fused in self.changes or (fused in self._packed and self._onto == "trained"):
                return partial(self._part, fused, part)
            return partial(self._files.read, key)
        name = next((n for n, k in self._names.items() if k == key), "")
        group = self._group(name)
        if name not in self.changes and group not in self.untied:  # tied weights change as one
            name = next((n for n in group if n in self.changes), name)
        if name in self.changes:
            return partial(self._merged, name)
        if name in self._packed and self._onto == "trained":
            return partial(self._roundtrip, name)
        return partial(self._read, name, key)

    def untied_tensors(self) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
        """Yield (key to write, key to read, how to form it) of tensors that the files lack."""
        for group in self.untied:
            for name in group:
                key = self._names[name]
                if key not in self._files.tensors:
                    stored = self._stored(name)
                    changed = name in self.changes
                    form = (
                        partial(self._merged, name)
                        if changed
                        else partial(self._read, name, stored)
                    )
                    yield key, stored, form

    def _group(self, name: str) -> list[str]:
        return next((group for group in self._ties if name in group), [])

    def _comes_apart(self, group: list[str]) -> bool:
        """Whether the parameters of a tied group get different values."""
        changes = [self.changes[name] for name in group if name in self.changes]
        copies = [change.copy for change in changes if change.copy is not None]
        same = len(copies) == len(group) and all(torch.equal(copies[0], c) for c in copies)
        return bool(changes) and not same

    def _stored(self, name: str) -> str:
        """The key that holds a parameter: its own, or that of a parameter it is tied to."""
        keys = [self._names[n] for n in (name, *self._group(name)) if n in self._names]
        return next((k for k in keys if k in self._files.tensors), "")

    # ---- values

    def _part(self, name: str, part: ExpertPart) -> Tensor:
        """A part of a fused weight, which is formed with the first and dropped with the last."""
        if name not in self._fused:
            form = self._merged if name in self.changes else self._roundtrip
            self._fused[name] = (form(name), len(self._files.parts[name]))
        fused, left = self._fused.pop(name)
        if left > 1:
            self._fused[name] = (fused, left - 1)
        return part.cut(fused)

    def _read(self, name: str, key: str) -> Tensor:
        tensor = self._files.read(key)
        expected = self._provenance.tensors.get(name)
        if expected is not None and expected[2]:
            shape, dtype, digest = expected
            seen = tensor.to(getattr(torch, dtype.removeprefix("torch.")))
            if list(tensor.shape) != shape or sampled_hash(seen) != digest:
                raise ValueError(
                    f"{self._files.directory}: expected the base that the adapter was trained on, "
                    f"got other values in {name}; nothing was written. Give that base; to merge "
                    "into another one, load it with from_pretrained and the adapter with "
                    "load_adapter, then merge_and_unload"
                )
        return tensor

    def _merged(self, name: str) -> Tensor:
        change = self.changes[name]
        if change.copy is not None:
            return change.copy
        original = self._read(name, self._stored(name))
        if change.biased:
            return self._merged_bias(change, original)
        return self._merged_weight(name, change, original)

    def _merged_bias(self, change: ParameterChange, original: Tensor) -> Tensor:
        site = change.biased[0].site
        at = change.part.key(site.parameter)
        weight = self._read(at, self._stored(at))
        bias: Tensor | None = original.float()
        with _weight_in(site, weight.float()):
            for adapter in change.biased:
                bias = adapter.edit().edited_bias(bias)
        assert bias is not None  # it started as a tensor
        return bias.detach()

    def _merged_weight(self, name: str, change: ParameterChange, original: Tensor) -> Tensor:
        site = change.edits[0].site
        to = original.dtype if self._dtype is None else self._dtype
        packed = name in self._packed
        W = _rewritten(change.edits, original.float())
        trained = self._quantized(name, W) if packed else W
        with torch.no_grad(), _weight_in(site, trained):
            start = site.ops.to_canonical(site.module, site.parameter, trained)
            edits = [_started(adapter, start).edit() for adapter in change.edits]
            wanted = apply_edits(site, edits, start.clone())
            size = float(torch.linalg.vector_norm(wanted - start)) ** 2
            other = wanted
            if packed:
                there = site.ops.to_canonical(site.module, site.parameter, W)
                other = apply_edits(site, edits, there.clone())
        results = {"trained": wanted, "original": other}
        if not wanted.isfinite().all():
            raise RuntimeError(
                f"export_merged {name!r}: expected finite weights, got NaN or infinity; nothing "
                "was written"
            )
        for base, result in results.items():
            self.error[base].add(result.to(to).float(), wanted, size)
        chosen = results[self._onto].to(to)
        return site.ops.from_canonical(site.module, site.parameter, chosen)

    def _roundtrip(self, name: str) -> Tensor:
        W = self._read(name, self._stored(name))
        return self._quantized(name, W.float()).to(W.dtype)

    def _quantized(self, name: str, W: Tensor) -> Tensor:
        """The natural weight as the storage of the training returned it, fp32."""
        assert self._quantization is not None  # `_packed` is empty without
        canonical = W.mT if self._packed[name] else W
        matrices = canonical.reshape(-1, *canonical.shape[-2:])
        done = torch.stack([_quantized_matrix(M, self._quantization) for M in matrices])
        result = done.reshape(canonical.shape)
        return result.mT if self._packed[name] else result


def _packed_weights(model: nn.Module, quantization: StorageConfig | None) -> dict[str, bool]:
    """Weights that training quantised → whether they are held transposed."""
    if quantization is None:
        return {}
    plan = plan_quantization(model, quantization, keep=_copied_modules(model))
    return {
        f"{name}.{weight}": layout.transposed
        for name, _, layout in plan.layers
        for weight in layout.names
    }


def _copied_modules(model: nn.Module) -> list[str]:
    return [
        name
        for _, _, registry in registries_in(model)
        for entry in registry.adapters.values()
        for name in entry.modules_to_save
    ]


def _ties(model: nn.Module) -> list[list[str]]:
    groups = [[place.name for place in group] for group in tied_parameters(model)]
    return [[n for n in group if not in_adapter(n)] for group in groups]


def _rewritten(adapters: Sequence[WeightAdapter], W: Tensor) -> Tensor:
    """The natural weight that the base keeps after initialisations that rewrite it."""
    for adapter in adapters:
        if adapter.method.rewrites_base:
            site = adapter.site
            M = site.ops.to_canonical(site.module, site.parameter, W)
            base = adapter.values_from_weight(dict(adapter.tensors()), site, M)
            W = W if base is None else site.ops.from_canonical(site.module, site.parameter, base)
    return W


def _started(adapter: WeightAdapter, W: Tensor) -> WeightAdapter:
    """The adapter with the buffers that attaching computes from the weight."""
    table = adapter.method.hf
    if adapter.method.starts_from_weight and not adapter.method.rewrites_base:
        values = dict(adapter.tensors())
        adapter.values_from_weight(values, adapter.site, W)
        filed = () if table is None else table.tensors
        for name, buffer in adapter.named_buffers(recurse=False):
            if name not in filed:
                buffer.copy_(values[name])
    return adapter


@contextmanager
def _weight_in(site: Site, W: Tensor) -> Iterator[None]:
    """Within the block, the module holds this weight: some edits read it."""
    owner_path, _, leaf = site.parameter.rpartition(".")
    owner = site.module.get_submodule(owner_path)
    without = owner._parameters[leaf]
    owner._parameters[leaf] = nn.Parameter(W, requires_grad=False)
    try:
        yield
    finally:
        owner._parameters[leaf] = without


def _quantized_matrix(M: Tensor, quantization: StorageConfig) -> Tensor:
    layer = nn.Linear(M.shape[1], M.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(M.contiguous(), requires_grad=False)
    ops = ops_for(layer)
    layout = None if ops is None else ops.weight_layout(layer)
    assert layout is not None  # a plain linear layer has one
    storage = storage_for(quantization)
    storage.quantize(layer, layout, quantization)
    return storage.read(layer, "weight", torch.float32)
