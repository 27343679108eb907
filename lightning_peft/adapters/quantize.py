"""Quantises a model: chooses the layers, then packs them layer by layer."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_peft.adapters.snapshot import ModelSnapshot
from lightning_peft.core.class_swap import PackedForward, Swapped, base_class, swap_out
from lightning_peft.core.modules import base_modules, parameter_at, tied_ids
from lightning_peft.core.names import matches_suffix, quoted, with_parents
from lightning_peft.core.protocols import Storage, WeightLayout
from lightning_peft.core.pruning_masks import held
from lightning_peft.layers import ops_for
from lightning_peft.layers.experts.ops import experts_refusal
from lightning_peft.models.frozen_parts import FrozenCopy, inside
from lightning_peft.models.modules import head_names
from lightning_peft.storage import StorageConfig, held_tensors, storage_for, storage_of
from lightning_peft.storage.unknown import computed_weight, unknown_format

__all__ = [
    "PackingWatch",
    "QuantizationPlan",
    "_to_dense_layer",
    "plan_quantization",
    "quantize_layers",
    "students_of_dense",
]


@dataclass
class QuantizationPlan:
    """What will be packed.

    Attributes:
        quantization: The configuration.
        storage: The storage that quantises under it.
        layers: (name, module, its weights) in the model's order.
        dense: (name, reason) of linear layers that stay as they are.
        transcoded: Names of those layers that arrived in another format.
    """

    quantization: StorageConfig
    storage: Storage
    layers: list[tuple[str, nn.Module, WeightLayout]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    transcoded: list[str] = field(default_factory=list)


def plan_quantization(
    model: nn.Module,
    quantization: StorageConfig,
    *,
    keep: Sequence[str] = (),
    frozen: Sequence[str] = (),
    averaged: Mapping[str, str] = MappingProxyType({}),
) -> QuantizationPlan:
    """Choose the layers and check their weights; nothing is changed.

    Args:
        model: The model.
        quantization: How.
        keep: Names of modules that stay dense (they are trained whole).
        frozen: Names of parts that stay dense because their outputs must not change.
        averaged: Parts that are averaged into a dense part, with its name; they stay dense too.

    Raises:
        ValueError: a weight with a NaN or an infinity, by name.
        ModuleNotFoundError: a package that the storage needs is missing.
    """
    storage = storage_for(quantization)
    storage.require_available()
    plan = QuantizationPlan(quantization, storage)
    heads = head_names(model)
    shared = tied_ids(model)
    fp32 = _keep_in_fp32(model)
    for name, module in base_modules(model).items():
        ops = ops_for(module)
        refusal = experts_refusal(module)
        if refusal:
            plan.dense.append((name, refusal))
        layout = None if ops is None else ops.weight_layout(module)
        arrived = {h.storage.exports for h in held_tensors(module).values()}
        if layout is None or False in arrived:
            continue
        reason = _stays_dense(name, module, layout, quantization, keep, heads, shared, fp32)
        reason = reason or ("frozen by you" if inside(name, frozen) else "")
        reason = reason or _averaged_into(name, averaged)
        reason = reason or _dense_reason(storage, name, module, layout, quantization)
        if reason:
            plan.dense.append((name, reason))
            continue
        if arrived:
            plan.transcoded.append(name)
        else:
            _require_values(storage, name, module, layout, quantization)
        plan.layers.append((name, module, layout))
    if not plan.layers:
        _warn_nothing_packed(model, plan)
    return plan


def _warn_nothing_packed(model: nn.Module, plan: QuantizationPlan) -> None:
    own = [
        m
        for m in base_modules(model).values()
        if any(p is not None for p in m._parameters.values())
    ]
    kinds = sorted({type(m).__name__ for m in own})
    left = ", ".join(f"{name} ({why})" for name, why in plan.dense[:3])
    warnings.warn(
        f"quantization {plan.storage.label}: packed no layer of {type(model).__name__}, which has "
        f"{', '.join(kinds[:6])}" + (f"; left dense: {left}" if left else ""),
        stacklevel=4,
    )


def _stays_dense(
    name: str,
    module: nn.Module,
    layout: WeightLayout,
    quantization: StorageConfig,
    keep: Sequence[str],
    heads: Iterable[str],
    shared: set[int],
    fp32: Sequence[str],
) -> str:
    if _is_excluded(name, quantization):
        return "excluded"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "read by nn.MultiheadAttention"
    if name in heads:
        return "output head"
    if any(name == k or name.startswith(f"{k}.") for k in keep):
        return "trained whole"
    reason = computed_weight(module, layout.names[0])
    if reason:
        return reason
    weight = held(module, layout.names[0])
    if isinstance(weight, UninitializedParameter):
        return "lazy: it has no shape yet"
    if id(weight) in shared:
        return "tied to another parameter"
    if any(part in name.split(".") for part in fp32):
        return "the model keeps it in fp32"
    if layout.names[0] in held_tensors(module):
        return ""  # in a released format, which is transcoded
    if not weight.is_floating_point():
        return f"already {weight.dtype}"
    unknown = unknown_format(module, layout.names[0])
    if unknown:
        return unknown
    return ""


def _is_excluded(name: str, quantization: StorageConfig) -> bool:
    return any(
        matches_suffix(part, [entry]) or fnmatch.fnmatch(part, entry)
        for entry in quantization.exclude_modules or ()
        for part in with_parents(name)
    )


def students_of_dense(
    copies: Sequence[FrozenCopy], quantization: StorageConfig | None
) -> dict[str, str]:
    """Return the trained parts whose frozen copy the quantisation excludes, with that copy.

    Code that averages one into the other needs equal parameters, so neither may be packed.
    """
    if quantization is None:
        return {}
    return {c.student: c.teacher for c in copies if _is_excluded(c.teacher, quantization)}


def _averaged_into(name: str, averaged: Mapping[str, str]) -> str:
    for student, teacher in averaged.items():
        if inside(name, [student]):
            return f"averaged into {teacher}, which is excluded"
    return ""


def _dense_reason(
    storage: Storage, name: str, module: nn.Module, layout: WeightLayout, config: StorageConfig
) -> str:
    """The storage's own reason; what it refuses is refused by name."""
    try:
        return storage.dense_reason(module, layout, config)
    except ValueError as error:
        raise ValueError(f"{quoted(name)}: {error}") from None


def _keep_in_fp32(model: nn.Module) -> list[str]:
    """Names of layers that a Hugging Face model keeps in fp32: its code casts activations to their
    weight's dtype.
    """
    names: set[str] = set()
    for module in base_modules(model).values():
        names.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    return sorted(names)


def _require_values(
    storage: Storage, name: str, module: nn.Module, layout: WeightLayout, config: StorageConfig
) -> None:
    """Raise if a weight is not finite, or is on the meta device and the storage needs values."""
    for key in layout.names:
        weight = parameter_at(module, key).detach()
        empty = weight.device.type == "meta"
        if empty and not storage.quantizes_meta:
            raise ValueError(
                f"quantize {quoted(name)} {key}: expected weights with values for {config}, got "
                "one on the meta device; build the model in memory, or use "
                "quantization='nf4', which base_from packs while it reads"
            )
        if empty or torch.isfinite(weight).all():
            continue
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"quantize {quoted(name)} {key}: expected finite weights, got {bad} NaN or infinite of "
            f"{weight.numel()}; repair the checkpoint, or keep the layer dense with "
            "Quantization(exclude_modules=[…])"
        )


@dataclass
class PackingWatch:
    """What happens around the packing of each layer.

    Attributes:
        packed: Names of packed layers; extended in place.
        keep: Called with each layer when it is packed.
        around: Entered for the packing of each layer.
        keep_on: Where a packed layer is moved to; None leaves it where it was packed.
    """

    packed: list[str]
    keep: Callable[[nn.Module], None]
    around: Callable[[nn.Module], AbstractContextManager[None]] = lambda _: nullcontext()
    keep_on: torch.device | None = None

    def note(self, name: str, module: nn.Module) -> None:
        """Remember a packed layer."""
        self.keep(module)
        self.packed.append(name)


def quantize_layers(
    model: nn.Module,
    plan: QuantizationPlan,
    device: torch.device | str | None,
    watch: PackingWatch,
) -> None:
    """Quantise one layer at a time: move it to the device, quantise it, free the dense weight.

    Args:
        model: The model.
        plan: The layers.
        device: Where to quantise; None means where each weight is.
        watch: What happens around each layer.

    Raises:
        RuntimeError: a layer failed; it is as before, and the layers before it are packed.
    """
    names = [name for name, _, _ in plan.layers]
    for name, module, layout in _progress(plan.layers):
        before = ModelSnapshot(module)
        with watch.around(module):
            try:
                has_values = held(module, layout.names[0]).device.type != "meta"
                if device is not None and has_values:
                    module.to(device)
                if name in plan.transcoded:
                    _to_dense_layer(module)
                plan.storage.quantize(module, layout, plan.quantization)
                if watch.keep_on is not None and has_values:
                    module.to(watch.keep_on)
                watch.note(name, module)
            except BaseException as error:
                if name not in watch.packed:
                    before.restore()
                if isinstance(error, Exception) and len(names) > 1:
                    rest = [n for n in names if n not in watch.packed]
                    raise RuntimeError(
                        f"quantize {quoted(name)}: {error}; packed: {watch.packed or 'none'}; "
                        f"untouched: {rest}; the model runs, and a second call packs the rest"
                    ) from error
                raise


def _to_dense_layer(module: nn.Module) -> None:
    """Dequantise a layer that arrived in a released format, so that it can be quantised again.

    A linear layer of another library becomes an `nn.Linear`; experts keep their class.
    """
    with torch.no_grad():
        for name in dict.fromkeys(h.weight for h in held_tensors(module).values()):
            storage = storage_of(module, name)
            storage.to_dense(module, name, storage.read(module, name))
    mixin: type[Swapped] | None = vars(type(module)).get("_swap_mixin")
    if mixin is not None and issubclass(mixin, PackedForward):
        swap_out(module, mixin)
    theirs = base_class(module).__module__.startswith("transformers.integrations.")
    if theirs and isinstance(module, nn.Linear):
        module.__class__ = nn.Linear
    vars(module).pop("_packed", None)


_Layers = list[tuple[str, nn.Module, WeightLayout]]


def _progress(layers: _Layers) -> Iterable[tuple[str, nn.Module, WeightLayout]]:
    """A bar on rank 0 when there is enough to wait for."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (distributed and torch.distributed.get_rank() != 0) or _numel(layers) < 1 << 28:
        return layers
    from rich.progress import track

    return track(layers, description="Quantising", transient=True)


def _numel(layers: _Layers) -> int:
    return sum(parameter_at(m, n).numel() for _, m, layout in layers for n in layout.names)
