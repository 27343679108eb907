"""Merge edits into the weights, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.activation import disable_adapters
from lightning_peft.adapters.merge_report import MergeReport, SiteError
from lightning_peft.core.class_swap import swap_in, swap_out
from lightning_peft.core.edit import Edit, apply_edits
from lightning_peft.core.pruning_masks import held, mask_of
from lightning_peft.core.registry import registries_in
from lightning_peft.layers.adapted import Adapted, adapted_modules, adapters_of, refresh
from lightning_peft.layers.adapter import Adapter
from lightning_peft.models.outputs import output_of, relative_change
from lightning_peft.storage import storage_of

__all__ = ["MergeReport", "SiteError", "merge", "unmerge"]


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
        into: For a quantised base: ``"dense"`` dequantises, adds and stays dense; ``"storage"``
            requantises.
        keep_base: Keep the stored bits on the CPU, so that `unmerge` restores them.
        base: Dense weights by parameter name to merge onto instead of the dequantised ones (the
            original checkpoint).
        batch: An example input (tensor, tuple or dict) on which the error of the output is
            measured; with `base`
            given too, for both bases, so that the report can say which one the adapter belongs to.

    Raises:
        RuntimeError: adapters are merged already, a method has no merged form, or W' is not finite.
        ValueError: ``base`` lacks a weight or has another shape; ``into`` is unknown.
    """
    if into not in ("dense", "storage"):
        raise ValueError(f"merge: into: expected 'dense' or 'storage', got {into!r}")
    wanted = _names(model, names)
    plans = [(label, m, _acting(m, wanted)) for label, m in adapted_modules(model)]
    _check(plans, base)
    if batch is None:
        return _merge_all(model, wanted, plans, into, keep_base, base)
    before = output_of(model, batch)
    with disable_adapters(model):
        plain = output_of(model, batch)
    errors = {}
    if base is not None:
        _merge_all(model, wanted, plans, into, True, None)
        errors["dequantized"] = relative_change(output_of(model, batch), before)
        unmerge(model)
    report = _merge_all(model, wanted, plans, into, keep_base, base)
    report.output_error = relative_change(output_of(model, batch), before)
    report.output_change = relative_change(before, plain)
    if base is not None:
        report.output_errors = {**errors, "original": report.output_error}
    return report


_Plan = tuple[str, Any, list[Adapter]]  # (module's name, module, adapters to merge)


def _merge_all(
    model: nn.Module,
    wanted: list[str],
    plans: Sequence[_Plan],
    into: str,
    keep_base: bool,
    base: Mapping[str, Tensor] | None,
) -> MergeReport:
    """Merge every module, or none: what is written is taken back when a later one fails."""
    report = MergeReport()
    tied = _tied(model)
    done: list[Any] = []
    try:
        with torch.no_grad():
            if not keep_base:  # nothing could be taken back, so form everything once before writing
                for label, module, adapters in plans:
                    for _ in _formed(label, module, adapters, base, _edits(adapters)):
                        pass
            for label, module, adapters in plans:
                done.append(module)
                if adapters:
                    _merge_module(label, module, adapters, into, base, tied, report)
                if not keep_base:
                    module._peft.unmerged_bits = {}
    except BaseException:
        for module in reversed(done):
            _undo(module)
        raise
    if report.untied:
        _untie_config(model, done[-1])
    for _, module, _ in plans:
        if not keep_base:
            module._peft.unmerged_bits = {"dropped": True}
        module._peft.merged = [n for n in wanted if n in module.peft]
        refresh(module)
    return report


def _undo(module: Any) -> None:
    for undo in reversed(list(module._peft.unmerged_bits.values())):
        undo()
    module._peft.unmerged_bits = {}


def _untie_config(model: nn.Module, holder: Any) -> None:
    """Hugging Face ties again by this flag when the merged model is loaded."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) is not True:
            continue
        config.tie_word_embeddings = False  # type: ignore[union-attr]

        def tie(config: Any = config) -> None:
            config.tie_word_embeddings = True

        holder._peft.unmerged_bits[f"config {id(config)}"] = tie


def unmerge(model: nn.Module) -> None:
    """Put the stored bits back; the adapters act again.

    Raises:
        RuntimeError: nothing is merged, or the bits were not kept.
    """
    modules = [
        (label, m) for label, m in adapted_modules(model) if m._peft.merged or m._peft.unmerged_bits
    ]
    if not modules:
        raise RuntimeError("unmerge: expected merged adapters, found none; call merge(model) first")
    for label, module in modules:
        if module._peft.unmerged_bits.get("dropped"):
            raise RuntimeError(
                f"unmerge {label!r}: expected kept bits, got keep_base=False; reload the base "
                "instead"
            )
    for _, module in reversed(modules):
        _undo(module)
        module._peft.merged = []
        refresh(module)


def _names(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    records = [r for _, _, r in registries_in(model)]
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


def _check(plans: Sequence[_Plan], base: Mapping[str, Tensor] | None) -> None:
    for label, module, adapters in plans:
        if module._peft.merged:
            raise RuntimeError(
                f"merge {label!r}: expected unmerged adapters, found {module._peft.merged}; "
                "unmerge first"
            )
        _check_order(label, module, adapters)
        for adapter in adapters:
            if not adapter.method.mergeable:
                raise RuntimeError(
                    f"merge {label!r}: {adapter.method.label} has no merged form: it adds "
                    f"{'modules' if adapter.kind == 'block' else 'positions'}, it does not change "
                    "weights; keep it attached"
                )
            if adapter.kind == "weight":
                edit = adapter.edit()
                for term in edit.terms:
                    term.matrix()  # NotMergeable where the change depends on the input
                _check_bias(label, module, adapter, edit)
    if base is not None:
        for label, _, adapters in plans:
            for a in adapters:
                key = f"{label}.{a.site.parameter}" if label else a.site.parameter
                if a.kind == "weight" and (key not in base or base[key].shape != _natural(a)):
                    found = list(base[key].shape) if key in base else "no such tensor"
                    raise ValueError(
                        f"merge base: expected {key} of shape {list(_natural(a))}, got {found}"
                    )


def _check_order(label: str, module: Any, merging: list[Adapter]) -> None:
    """What stays attached acts on the merged weight, so it must come after, or be a mere sum."""
    edits = list(module._peft.edits)
    staying = [a for a in edits if a not in merging]
    if not staying or edits[: len(edits) - len(staying)] == [a for a in edits if a in merging]:
        return
    for adapter in edits:
        if adapter.edit().form() - {"low_rank", "terms", "bias", "dropout"}:
            raise RuntimeError(
                f"merge {label!r}: expected the first of the active adapters "
                f"{[a.adapter_name for a in edits]}, got {[a.adapter_name for a in merging]}; "
                f"{adapter.method.label} does not commute with it: merge all, or activate them in "
                "another order"
            )


def _check_bias(label: str, module: Any, adapter: Adapter, edit: Edit) -> None:
    site = adapter.site
    path = site.ops.bias(module, site.parameter)
    if path is None and edit.bias is not None and (site.is_embedding or site.parameter != "weight"):
        raise RuntimeError(
            f"merge {label!r}: expected a layer that can hold a bias, got {type(module).__name__} "
            f"with a change of its bias by {adapter.method.label}; keep it attached"
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


def _edits(adapters: list[Adapter]) -> dict[str, list[Edit]]:
    """By weight; all formed before any write, because DoRA reads W."""
    edits: dict[str, list[Edit]] = {}
    for adapter in adapters:
        if adapter.kind == "weight":
            edits.setdefault(adapter.site.parameter, []).append(adapter.edit())
    return edits


def _formed(
    label: str,
    module: Any,
    adapters: list[Adapter],
    base: Mapping[str, Tensor] | None,
    edits: Mapping[str, list[Edit]],
) -> Iterator[tuple[str, str, list[Adapter], Tensor, Tensor, Tensor]]:
    """(path, key, adapters, W, base it is merged onto, W') of every weight, canonical and fp32."""
    for path, changes in edits.items():
        group = [a for a in adapters if a.kind == "weight" and a.site.parameter == path]
        site = group[0].site
        key = f"{label}.{path}" if label else path
        W = site.weight(torch.float32).clone()  # dense storage is read without a copy
        start = (
            W
            if base is None
            else site.ops.to_canonical(module, path, base[key].to(W.device, torch.float32))
        )
        merged = apply_edits(site, changes, start)
        if not merged.isfinite().all():
            raise RuntimeError(
                f"merge {key!r}: expected finite weights, got NaN or infinity; nothing was changed"
            )
        yield path, key, group, W, start, merged


def _merge_module(
    label: str,
    module: Any,
    adapters: list[Adapter],
    into: str,
    base: Mapping[str, Tensor] | None,
    tied: set[int],
    report: MergeReport,
) -> None:
    undo: dict[str, Any] = module._peft.unmerged_bits
    edits = _edits(adapters)
    for path, key, group, W, start, merged in _formed(label, module, adapters, base, edits):
        site = group[0].site
        _untie(module, path, tied, key, undo, report)
        undo[path] = _write(module, group, merged, into)
        stored = group[0].site.weight(torch.float32)
        report.sites.append(
            SiteError(
                key,
                relative_change(merged, W),
                relative_change(stored, merged),
                None if base is None else relative_change(stored, start),
            )
        )
        _merge_bias(module, site.ops.bias(module, path), edits[path], undo)
    for adapter in adapters:
        for path, value in adapter.copies().items() if adapter.kind == "select" else ():
            _untie(module, path, tied, f"{label}.{path}", undo, report)
            undo[f"copy {adapter.adapter_name} {path}"] = _overwrite(
                module.get_parameter(path), value
            )


def _write(module: Any, group: list[Adapter], merged: Tensor, into: str) -> Callable[[], None]:
    site = group[0].site
    storage, path = site.storage, site.parameter
    natural = site.ops.from_canonical(module, path, merged)
    if into == "storage" or storage.label == "dense":
        bits = storage.snapshot(module, path)
        storage.write(module, path, natural)
        return lambda: storage.restore(module, path, bits)
    swap_out(module, Adapted)
    try:
        back = storage.to_dense(module, path, natural)
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
    undo[f"bias {path}"] = lambda: owner.register_parameter(leaf, None)


def _overwrite(parameter: Tensor, value: Tensor) -> Callable[[], None]:
    bits = parameter.detach().to("cpu", copy=True)
    parameter.data.copy_(value)

    def undo() -> None:
        parameter.data.copy_(bits)

    return undo


def _untie(
    module: Any, path: str, tied: set[int], key: str, undo: dict[str, Any], report: MergeReport
) -> None:
    """Give the module a tensor of its own: a write would change the other owner too."""
    parameter = held(module, path)
    if id(parameter) not in tied:
        return
    if mask_of(module, path) is not None:
        raise RuntimeError(
            f"merge {key!r}: expected a weight of its own, got a tied one that torch prunes; make "
            "that permanent first (torch.nn.utils.prune.remove)"
        )
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path) if owner_path else module
    owner._parameters[leaf] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    report.untied.append(key)

    def tie() -> None:
        owner._parameters[leaf] = parameter

    undo[f"tie {path}"] = tie
