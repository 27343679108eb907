"""Merge edits into the weights, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.edit import Edit
from lightning_peft.layers.adapted import Adapted, Adapter, adapted_modules, adapters_of, refresh
from lightning_peft.record import records_in
from lightning_peft.storage import storage_of
from lightning_peft.swap import swap_in, swap_out

__all__ = ["MergeReport", "SiteError", "merge", "unmerge"]


@dataclass(frozen=True)
class SiteError:
    """What merging did to one weight.

    Attributes:
        name: The weight.
        delta: ‖W' − W‖ / ‖W‖: how much the adapter changes it.
        error: ‖stored − W'‖ / ‖W'‖: what rounding or requantising lost.
    """

    name: str
    delta: float
    error: float


@dataclass
class MergeReport:
    """Errors of a merge.

    Attributes:
        sites: One entry a weight.
        untied: Parameters that were tied and got a tensor of their own.
        output_error: ‖merged − attached‖ / ‖attached‖ of the output on the batch given; None without one.
    """

    sites: list[SiteError] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    output_error: float | None = None

    @property
    def worst(self) -> float:
        """Largest relative error of a weight."""
        return max((s.error for s in self.sites), default=0.0)

    def __str__(self) -> str:
        """Two lines: weights and output."""
        text = f"merged {len(self.sites)} weights, largest relative error {self.worst:.2e}"
        if self.untied:
            text += f"; untied {', '.join(self.untied)}"
        if self.output_error is not None:
            text += f"\noutput on the batch differs by {self.output_error:.2e} (relative)"
        return text


def merge(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    into: Literal["dense", "storage"] = "dense",
    keep_base: bool = True,
    base: Mapping[str, Tensor] | None = None,
    batch: Any = None,
) -> MergeReport:
    """Write W' into the weights, in fp32 and with one rounding; forward then runs the plain layers.

    Args:
        model: A model with adapters.
        names: Which adapters; None means the active ones.
        into: For a quantised base: ``"dense"`` dequantises, adds and stays dense; ``"storage"`` requantises.
        keep_base: Keep the stored bits on the CPU, so that `unmerge` restores them.
        base: Dense weights by parameter name to merge onto instead of the dequantised ones (the original checkpoint).
        batch: An example input (tensor, tuple or dict) on which the error of the output is measured.

    Raises:
        RuntimeError: adapters are merged already, or a method has no merged form.
        ValueError: ``base`` lacks a weight or has another shape.
    """
    wanted = _names(model, names)
    plans = [(label, m, _acting(m, wanted)) for label, m in adapted_modules(model)]
    _check(plans, base)
    before = None if batch is None else _run(model, batch)
    report = MergeReport()
    tied = _tied(model)
    with torch.no_grad():
        for label, module, adapters in plans:
            if adapters:
                _merge_module(label, module, adapters, into, keep_base, base, tied, report)
            module._peft.merged = [n for n in wanted if n in module.peft]
            refresh(module)
    if before is not None:
        after = _run(model, batch)
        report.output_error = float((after - before).norm() / before.norm())
    return report


def unmerge(model: nn.Module) -> None:
    """Put the stored bits back; the adapters act again.

    Raises:
        RuntimeError: nothing is merged, or the bits were not kept.
    """
    modules = [(label, m) for label, m in adapted_modules(model) if m._peft.merged]
    if not modules:
        raise RuntimeError("unmerge: expected merged adapters, found none; call merge(model) first")
    for label, module in modules:
        if module._peft.unmerged_bits.get("dropped"):
            raise RuntimeError(
                f"unmerge {label!r}: expected kept bits, got keep_base=False; reload the base instead"
            )
    for _, module in modules:
        for undo in reversed(list(module._peft.unmerged_bits.values())):
            undo()
        module._peft.unmerged_bits = {}
        module._peft.merged = []
        refresh(module)


def _names(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    records = [r for _, _, r in records_in(model)]
    known = {n for r in records for n in r.adapters}
    wanted = (
        [n for r in records for n in r.active]
        if names is None
        else [names]
        if isinstance(names, str)
        else list(names)
    )
    for name in wanted:
        if name not in known:
            raise KeyError(f"merge: expected one of {sorted(known)}, got {name!r}")
    if not wanted:
        raise RuntimeError(
            "merge: expected an active adapter, found none; name one, or call set_adapter first"
        )
    return list(dict.fromkeys(wanted))


def _acting(module: Any, names: Sequence[str]) -> list[Adapter]:
    return [a for n in names for a in adapters_of(module, n)]


def _check(
    plans: Sequence[tuple[str, Any, list[Adapter]]], base: Mapping[str, Tensor] | None
) -> None:
    for label, module, adapters in plans:
        if module._peft.merged:
            raise RuntimeError(
                f"merge {label!r}: expected unmerged adapters, found {module._peft.merged}; unmerge first"
            )
        for adapter in adapters:
            if not adapter.method.mergeable:
                raise RuntimeError(
                    f"merge {label!r}: {adapter.method.label} has no merged form: it adds "
                    f"{'modules' if adapter.kind == 'block' else 'positions'}, it does not change weights; "
                    "keep it attached"
                )
            for term in adapter.edit().terms if adapter.kind == "weight" else ():
                term.matrix()  # NotMergeable where the change depends on the input
    if base is not None:
        for label, _, adapters in plans:
            for a in adapters:
                key = f"{label}.{a.site.parameter}" if label else a.site.parameter
                if a.kind == "weight" and (key not in base or base[key].shape != _natural(a)):
                    found = list(base[key].shape) if key in base else "no such tensor"
                    raise ValueError(
                        f"merge base: expected {key} of shape {list(_natural(a))}, got {found}"
                    )


def _natural(adapter: Adapter) -> torch.Size:
    return adapter.site.storage.shape(adapter.site.module, adapter.site.parameter)


def _tied(model: nn.Module) -> set[int]:
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    return {i for i, who in owners.items() if len(who) > 1}


def _merge_module(
    label: str,
    module: Any,
    adapters: list[Adapter],
    into: str,
    keep_base: bool,
    base: Mapping[str, Tensor] | None,
    tied: set[int],
    report: MergeReport,
) -> None:
    undo: dict[str, Any] = {}
    by_weight: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.kind == "weight":
            by_weight.setdefault(adapter.site.parameter, []).append(adapter)
    edited = {
        path: [a.edit() for a in group] for path, group in by_weight.items()
    }  # before any write: DoRA reads W
    for path, group in by_weight.items():
        site = group[0].site
        key = f"{label}.{path}" if label else path
        W = site.weight(torch.float32)
        start = (
            W
            if base is None
            else site.ops.to_matrix(module, path, base[key].to(W.device, torch.float32))
        )
        merged = site.edited(edited[path], start)
        if not merged.isfinite().all():
            raise RuntimeError(
                f"merge {key!r}: expected finite weights, got NaN or infinity; nothing was written here"
            )
        _untie(module, path, tied, key, undo, report)
        undo[path] = _write(module, group, merged, into)
        stored = group[0].site.weight(torch.float32)
        report.sites.append(
            SiteError(
                key,
                float((merged - W).norm() / W.norm().clamp_min(1e-30)),
                float((stored - merged).norm() / merged.norm().clamp_min(1e-30)),
            )
        )
        _merge_bias(module, site.ops.bias(module, path), edited[path], undo)
    for adapter in adapters:
        for path, value in adapter.copies().items() if adapter.kind == "select" else ():
            _untie(module, path, tied, f"{label}.{path}", undo, report)
            undo[f"copy {adapter.adapter_name} {path}"] = _overwrite(
                module.get_parameter(path), value
            )
    module._peft.unmerged_bits = undo if keep_base else {"dropped": True}


def _write(module: Any, group: list[Adapter], merged: Tensor, into: str) -> Callable[[], None]:
    site = group[0].site
    storage, path = site.storage, site.parameter
    natural = site.ops.from_matrix(module, path, merged)
    if into == "storage" or storage.label == "dense":
        bits = storage.snapshot(module, path)
        storage.write(module, path, natural)
        return lambda: storage.restore(module, path, bits)
    swap_out(module, Adapted)
    try:
        back = storage.densify(module, path, natural)
    finally:
        swap_in(module, Adapted)
    dense = storage_of(module, path)
    for adapter in adapters_of(module):
        if adapter.site.parameter == path:
            adapter.site.storage = dense

    def undo() -> None:
        swap_out(module, Adapted)
        try:
            back()
        finally:
            swap_in(module, Adapted)
        for adapter in adapters_of(module):
            if adapter.site.parameter == path:
                adapter.site.storage = storage

    return undo


def _merge_bias(module: Any, path: str | None, edits: Sequence[Edit], undo: dict[str, Any]) -> None:
    owner_path, _, leaf = (path or "bias").rpartition(".")
    owner = module.get_submodule(owner_path) if owner_path else module
    b: Tensor | None = getattr(owner, leaf, None)
    edited = None if b is None else b.detach()
    start = edited
    for e in edits:
        edited = e.edited_bias(edited)
    if edited is start or edited is None:
        return
    if b is not None:
        undo[f"bias {path}"] = _overwrite(b, edited)
        return
    reference = next(iter(module.parameters()))
    dtype = edited.dtype if not reference.is_floating_point() else reference.dtype
    owner.register_parameter(leaf, nn.Parameter(edited.detach().to(dtype), requires_grad=False))
    undo["bias"] = lambda: owner.register_parameter(leaf, None)


def _overwrite(parameter: Tensor, value: Tensor) -> Callable[[], None]:
    bits = parameter.detach().to("cpu", copy=True)
    parameter.data.copy_(value)

    def undo() -> None:
        parameter.data.copy_(bits)

    return undo


def _untie(
    module: Any, path: str, tied: set[int], key: str, undo: dict[str, Any], report: MergeReport
) -> None:
    """Give this module a tensor of its own, or the write would change the other owner too."""
    parameter = module.get_parameter(path)
    if id(parameter) not in tied:
        return
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path) if owner_path else module
    owner._parameters[leaf] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    report.untied.append(key)

    def tie() -> None:
        owner._parameters[leaf] = parameter

    undo[f"tie {path}"] = tie


def _run(model: nn.Module, batch: Any) -> Tensor:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                out = model(**batch)
            elif isinstance(batch, tuple | list):
                out = model(*batch)
            else:
                out = model(batch)
    finally:
        model.train(training)
    for attribute in ("logits", "last_hidden_state"):
        if getattr(out, attribute, None) is not None:
            out = getattr(out, attribute)
            break
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor.float()
