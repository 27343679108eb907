"""Attach and detach: the surgery, in place, on any `nn.Module`.

Everything that can be refused is refused before the first change. Base keys never change; adapters
stand beside the weight as `<module>.peft.<adapter name>.<tensor>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_peft.adapters.activation import activate, set_adapter
from lightning_peft.adapters.build import (
    AdapterBuilder,
    Planned,
    guard_fast_path,
    start_state,
)
from lightning_peft.adapters.placement.weights import place, refuse_unfit
from lightning_peft.adapters.quantize import plan_quantization, quantize_layers
from lightning_peft.core.names import nearest_names
from lightning_peft.core.registry import (
    AdapterEntry,
    AdapterRegistry,
    forget,
    registries_in,
    registry_of,
)
from lightning_peft.initialization.restore import needs_data
from lightning_peft.layers.adapted import (
    adapted_modules,
    adapters_of,
    refresh,
    release,
)
from lightning_peft.layers.projection_groups.group import share_inputs
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.methods.modules_to_save import ModulesToSave, TrainedBias
from lightning_peft.models.fingerprint import buffer_hashes, fingerprint
from lightning_peft.models.target_modules import feedforward_targets
from lightning_peft.report.summary import Report, parameter_report
from lightning_peft.storage import Quantization

__all__ = ["Planned", "attach", "detach", "plan_attach", "quantize", "reset_adapters"]


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    adapter_name: str = "default",
    quantization: Quantization | None = None,
    modules_to_save: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> Report:
    """Freeze the model, quantise it if asked, and attach an adapter in place.

    Args:
        model: Any module; a Hugging Face model, a LightningModule, or one layer.
        method: One method, or several as a hybrid under one name (applied in this order).
        adapter_name: Letters, digits, ``_`` and ``-``.
        quantization: Quantise the frozen linear layers, one at a time.
        modules_to_save: Names or suffixes of modules to train whole.
        device: Where to quantise; the weights stay there. None means where each weight is.

    Returns:
        The report of what matched and what it costs.

    Raises:
        ValueError: a bad name, nothing matches, a method has no meaning at a layer, non-finite
            weights.
        RuntimeError: the name is taken, or adapters are merged.
    """
    methods = [method] if isinstance(method, Method) else list(method)
    _require_parameters(model)
    _check_name(model, adapter_name)
    methods = [_resolved(m, model) for m in methods]
    if not methods and not modules_to_save:
        raise ValueError(
            "attach: expected at least one method or modules_to_save, got none; everything would "
            "be frozen"
        )
    saved = _saved_modules(model, modules_to_save)
    planned, skipped, tied = plan_attach(model, methods, saved)
    packing = None if quantization is None else plan_quantization(model, quantization, keep=saved)
    _refuse_packed_copies(planned, packing)
    record = registry_of(model, create=True)
    assert record is not None
    if record.fingerprint is None:
        record.fingerprint = fingerprint(model, _copied(planned))
        record.buffers = buffer_hashes(model)
    if not record.requires_grad:
        record.requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    making = AdapterBuilder(planned, adapter_name)
    if packing is not None:
        quantize_layers(model, packing, device, making.around_packing)
        record.quantization = quantization
        record.dense = packing.dense
    making.finish()
    guard_fast_path(model)
    share_inputs(model)
    entry = AdapterEntry(methods, tuple(saved))
    entry.sites = [
        (p.site.label, tuple(p.site.shape), m.label) for m, _, p in planned if not p.paths
    ]
    record.adapters[adapter_name] = entry
    record.skipped, record.tied = skipped, tied
    activate(model, record, [adapter_name])
    return parameter_report(model)


def quantize(
    model: nn.Module,
    quantization: Quantization,
    *,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> Report:
    """Quantise the linear layers of a model in place, one at a time; the output head stays dense.

    Raises:
        ValueError: a weight is not finite; nothing is changed.
        RuntimeError: adapters are attached already.
    """
    if any(True for _ in adapted_modules(model)):
        raise RuntimeError(
            "quantize: expected a model without adapters, found some; quantise first, or give "
            "attach() the quantization"
        )
    packing = plan_quantization(model, quantization, keep=list(exclude))
    record = registry_of(model, create=True)
    assert record is not None
    record.fingerprint, record.buffers = fingerprint(model), buffer_hashes(model)
    quantize_layers(model, packing, device)
    guard_fast_path(model)
    record.quantization, record.dense = quantization, packing.dense
    return parameter_report(model)


def detach(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove one adapter, or all: class, keys and bits of the base as before (a quantised base
    stays quantised).

    Raises:
        KeyError: no adapter of that name.
        RuntimeError: the adapter is merged; unmerge first.
    """
    for prefix, root, record in list(registries_in(model)):
        names = list(record.adapters) if adapter_name is None else [adapter_name]
        if adapter_name is not None and adapter_name not in record.adapters:
            raise KeyError(
                f"detach: expected one of {sorted(record.adapters)}, got {adapter_name!r}"
            )
        _detach_from(root, record, names)
        del prefix


def _detach_from(root: nn.Module, record: AdapterRegistry, names: list[str]) -> None:
    for name, module in adapted_modules(root):
        if set(module._peft.merged) & set(names):
            raise RuntimeError(
                f"{name!r}: expected unmerged adapters, found {module._peft.merged} merged; "
                "unmerge first"
            )
    activate(root, record, [n for n in record.active if n not in names])
    for _, module in list(adapted_modules(root)):
        for name in names:
            if name in module.peft:
                for adapter in adapters_of(module, name):
                    if adapter.tap is not None:
                        adapter.tap.handle.remove()
                del module.peft[name]
        refresh(module)
        if not module.peft:
            release(module)
    share_inputs(root)
    for name in names:
        del record.adapters[name]
    if not record.adapters:
        for name, parameter in root.named_parameters():
            if record.requires_grad.get(name, False) and parameter.is_floating_point():
                parameter.requires_grad_(True)
        record.requires_grad = {}
        if record.quantization is None:
            forget(root)


def reset_adapters(model: nn.Module, seed: int | None = None) -> None:
    """Give every adapter its start values again, as attach would under this seed.

    Raises:
        RuntimeError: an adapter rewrote the base when it was attached, or started from data; detach
            and attach again.
    """
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module):
            from_data = needs_data(adapter) and not adapter.waiting
            if adapter.rewrite is not None or from_data:
                raise RuntimeError(
                    f"{adapter.site.label}: expected an adapter whose start leaves the base alone "
                    f"and needs no data, got {adapter.method.label}; detach and attach again"
                )
            fresh = start_state(adapter, seed)
            with torch.no_grad():
                for key, tensor in adapter.state_dict(keep_vars=True).items():
                    if key in fresh:
                        tensor.copy_(fresh[key])


# ---- before anything changes


def _resolved(method: Method, model: nn.Module) -> Method:
    if not isinstance(method, WeightMethod):
        return method
    return method.resolved(feedforward_targets(model))


def _check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            "adapter_name: expected letters, digits, '_' and '-', and not an attribute of "
            f"nn.ModuleDict, got {name!r}; choose another name"
        )
    for _, _, record in registries_in(model):
        if name in record.adapters:
            raise RuntimeError(
                f"adapter_name: expected a free name, got {name!r}, which is attached already; "
                "detach it first or choose another name"
            )
    if any(module._peft.merged for _, module in adapted_modules(model)):
        raise RuntimeError(
            "attach: expected unmerged adapters, found merged ones; call unmerge(model) first"
        )


def _require_parameters(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: expected an nn.Module, got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"attach to {type(model).__name__}: expected a module with parameters, found none; "
            "build the model first, or give the module that holds it"
        )


def _saved_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Fully qualified names; a suffix takes every module that ends in it, at a dot."""
    names = [n for n, _ in model.named_modules() if n and "peft" not in n.split(".")]
    found: list[str] = []
    for suffix in wanted:
        hits = [n for n in names if n == suffix or n.endswith(f".{suffix}")]
        if not hits:
            raise ValueError(
                f"modules_to_save: expected a module of this model, got {suffix!r}; nearest names: "
                f"{nearest_names(suffix, names)}"
            )
        found += [h for h in hits if h not in found]
    return found


def plan_attach(
    model: nn.Module, methods: Sequence[Method], saved: Sequence[str]
) -> tuple[list[Planned], list[tuple[str, str]], list[tuple[str, ...]]]:
    """What `attach` would make, in order; (name, reason) of layers left out; tied groups. Changes
    nothing.
    """
    planned: list[Planned] = []
    skipped: list[tuple[str, str]] = []
    tied: list[tuple[str, ...]] = []
    for i, method in enumerate(methods):
        placements, selection = place(model, method)
        inside = [
            p for p in placements if any(p.name == s or p.name.startswith(f"{s}.") for s in saved)
        ]
        placements = [p for p in placements if p not in inside]
        skipped += [(p.name, "trained whole (modules_to_save)") for p in inside]
        if selection is not None:
            skipped += list(selection.skipped)
            tied = list(selection.tied)
        planned += [(method, str(i) if len(methods) > 1 else "", p) for p in placements]
        which = method.trained_biases() if isinstance(method, WeightMethod) else "none"
        if which != "none":
            names = None if which == "all" else tuple(p.name for p in placements)
            bias = TrainedBias(modules=names)
            planned += [(bias, "biases", p) for p in place(model, bias)[0]]
    if saved:
        copies = ModulesToSave(modules=tuple(saved))
        planned += [
            (copies, "saved" if _overlaps(planned, saved) else "", p)
            for p in place(model, copies)[0]
        ]
    for _, _, placement in planned:
        refuse_unfit(placement)
    return planned, skipped, tied


def _refuse_packed_copies(planned: Sequence[Planned], packing: Any) -> None:
    packed = set() if packing is None else {id(m) for _, m in packing.layers}
    for method, _, placement in planned:
        if id(placement.module) in packed and "weight" in placement.paths:
            raise ValueError(
                f"{method.label} on {placement.name!r}: expected a dense weight to train a copy "
                "of, got one that is to be quantised; exclude it from the quantization, or use an "
                "adapter"
            )


def _copied(planned: Sequence[Planned]) -> set[str]:
    """Names of the parameters of which a copy will be trained."""
    return {f"{p.name}.{path}" if p.name else path for _, _, p in planned for path in p.paths}


def _overlaps(planned: Sequence[Planned], saved: Sequence[str]) -> bool:
    return any(p.name.startswith(f"{s}.") or p.name == s for _, _, p in planned for s in saved)


__all__ += ["set_adapter"]
