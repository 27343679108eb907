"""Merge edits into the weights, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.activation import disable_adapters
from lightning_peft.adapters.merge_plan import ModuleMerge, check_merge, names_to_merge, plan_merge
from lightning_peft.adapters.merge_report import MergeReport, SiteError
from lightning_peft.adapters.merge_undo import (
    AddedBias,
    Untied,
    UntiedConfig,
    make_dense,
    overwrite,
    write_weight,
)
from lightning_peft.core.edit import Edit, apply_edits
from lightning_peft.core.modules import tied_ids
from lightning_peft.core.pruning_masks import held, mask_of
from lightning_peft.layers.adapted import Adapted, adapted_modules, refresh
from lightning_peft.layers.adapted_state import MergeUndo, UndoStep
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.models.outputs import output_of, relative_change

__all__ = ["MergeReport", "SiteError", "merge", "unmerge"]

_Into = Literal["dense", "storage"]


def merge(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    into: _Into = "dense",
    keep_base: bool = True,
    base: Mapping[str, Tensor] | None = None,
    batch: Any = None,
) -> MergeReport:
    """Write W' into the weights, in fp32 and with one rounding; forward then runs the plain layers.

    The adapters stay attached, so that `unmerge` can take the change back, and layers that no
    adapter changes stay packed. `merge_and_unload` makes the model plain, for `save_pretrained`.

    Args:
        model: A model with adapters.
        names: Adapters to merge; None means the active ones.
        into: For a quantised base: ``"dense"`` dequantises, adds and stays dense; ``"storage"``
            requantises.
        keep_base: Keep the stored bits on the CPU, so that `unmerge` restores them.
        base: Dense weights by parameter name to merge onto instead of the dequantised ones (the
            original checkpoint).
        batch: An example input (tensor, tuple or dict) on which the error of the output is
            measured. With `base` given too, it is measured for both bases, so that the report can
            say which one the adapter belongs to.

    Raises:
        RuntimeError: adapters are merged already, a method has no merged form, or W' is not finite.
        ValueError: ``base`` lacks a weight or has another shape; ``into`` is unknown.
    """
    if into not in ("dense", "storage"):
        raise ValueError(f"merge: into: expected 'dense' or 'storage', got {into!r}")
    wanted = names_to_merge(model, names)
    plan = plan_merge(model, wanted)
    check_merge(plan, base)
    if batch is None:
        return _merge_all(model, wanted, plan, into, keep_base, base)
    before = output_of(model, batch)
    with disable_adapters(model):
        plain = output_of(model, batch)
    errors = {}
    if base is not None:
        _merge_all(model, wanted, plan, into, True, None)
        errors["dequantized"] = relative_change(output_of(model, batch), before)
        unmerge(model)
    report = _merge_all(model, wanted, plan, into, keep_base, base)
    report.output_error = relative_change(output_of(model, batch), before)
    report.output_change = relative_change(before, plain)
    if base is not None:
        report.output_errors = {**errors, "original": report.output_error}
    return report


def unmerge(model: nn.Module) -> None:
    """Put the stored bits back; the adapters act again.

    Raises:
        RuntimeError: nothing is merged, or the bits were not kept.
    """
    modules = [
        (label, m)
        for label, m in adapted_modules(model)
        if m._peft.active.merged or m._peft.merge_undo is not None
    ]
    if not modules:
        raise RuntimeError("unmerge: expected merged adapters, found none; call merge(model) first")
    for label, module in modules:
        undo = module._peft.merge_undo
        if undo is not None and not undo.base_kept:
            raise RuntimeError(
                f"unmerge {label!r}: expected kept bits, got keep_base=False; reload the base "
                "instead"
            )
    for _, module in reversed(modules):
        _undo(module)
        module._peft.active.merged = []
        refresh(module)


def _undo(module: Adapted) -> None:
    undo, module._peft.merge_undo = module._peft.merge_undo, None
    if undo is not None:
        undo.undo()


# ---- all modules, or none


def _merge_all(
    model: nn.Module,
    wanted: list[str],
    plan: Sequence[ModuleMerge],
    into: _Into,
    keep_base: bool,
    base: Mapping[str, Tensor] | None,
) -> MergeReport:
    """Merge every module, or none: if one fails, all that was written is taken back."""
    report = MergeReport()
    tied = tied_ids(model)
    done: list[Adapted] = []
    try:
        with torch.no_grad():
            if not keep_base:  # nothing could be taken back, so all is checked before any write
                _check_finite(plan, base)
            for part in plan:
                undo = part.module._peft.merge_undo = MergeUndo()
                done.append(part.module)
                _merge_module(part, _Merging(into, base, tied, undo.steps, report))
                if not undo.steps or not keep_base:
                    part.module._peft.merge_undo = None
    except BaseException:
        for module in reversed(done):
            _undo(module)
        raise
    if report.untied:
        _untie_configs(model, done[-1])
    for part in plan:
        if not keep_base:
            part.module._peft.merge_undo = MergeUndo(base_kept=False)
        part.module._peft.active.merged = [n for n in wanted if n in part.module.peft]
        refresh(part.module)
    return report


def _untie_configs(model: nn.Module, holder: Adapted) -> None:
    """Clear the flag by which Hugging Face ties embeddings again when it loads the merged model."""
    undo = holder._peft.merge_undo or MergeUndo()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) is True:
            config.tie_word_embeddings = False
            undo.steps.append(UntiedConfig(config))
    if undo.steps:
        holder._peft.merge_undo = undo


def _check_finite(plan: Sequence[ModuleMerge], base: Mapping[str, Tensor] | None) -> None:
    """Raise RuntimeError if a merged weight would not be finite."""
    for part in plan:
        for change in _changes(part):
            change.form(base)


# ---- one module


@dataclass
class _Merging:
    """Settings of a merge, and its results so far.

    Attributes:
        into: Whether a quantised weight becomes dense or is requantised.
        base: Dense weights to merge onto, None for the stored ones.
        tied: Ids of the parameters that several modules hold.
        steps: Changes made to the module so far; extended in place.
        report: The report; extended in place.
    """

    into: _Into
    base: Mapping[str, Tensor] | None
    tied: set[int]
    steps: list[UndoStep]
    report: MergeReport


@dataclass
class _Formed:
    """A weight before and after a merge, canonical and fp32.

    Attributes:
        stored: The weight as the storage reads it.
        start: The weight that is merged onto.
        merged: The weight with all edits.
    """

    stored: Tensor
    start: Tensor
    merged: Tensor


@dataclass
class _WeightChange:
    """All edits of one weight.

    Attributes:
        module: The module that reads the weight.
        key: Fully qualified name of the weight.
        adapters: Adapters to merge, in order.
        edits: Their edits.
    """

    module: Adapted
    key: str
    adapters: list[WeightAdapter]
    edits: list[Edit]

    def form(self, base: Mapping[str, Tensor] | None) -> _Formed:
        """The weight with all edits.

        Raises:
            RuntimeError: it is not finite.
        """
        site = self.adapters[0].site
        W = start = site.weight(torch.float32).clone()  # dense storage is read without a copy
        if base is not None:
            given = base[self.key].to(W.device, torch.float32)
            start = site.ops.to_canonical(self.module, site.parameter, given)
        merged = apply_edits(site, self.edits, start)
        if not merged.isfinite().all():
            raise RuntimeError(
                f"merge {self.key!r}: expected finite weights, got NaN or infinity; nothing was "
                "changed"
            )
        return _Formed(W, start, merged)


def _changes(part: ModuleMerge) -> list[_WeightChange]:
    """Edits by weight. All are formed before any write, because DoRA reads W."""
    by_path: dict[str, list[WeightAdapter]] = {}
    for adapter in part.edits():
        by_path.setdefault(adapter.site.parameter, []).append(adapter)
    return [
        _WeightChange(part.module, part.key(path), group, [a.edit() for a in group])
        for path, group in by_path.items()
    ]


def _merge_module(part: ModuleMerge, merging: _Merging) -> None:
    for change in _changes(part):
        _merge_weight(change, merging)
    for adapter in part.adapters:
        for path, value in adapter.copies().items():
            _untie(part.module, path, f"{part.label}.{path}", merging)
            merging.steps.append(overwrite(part.module.get_parameter(path), value))


def _merge_weight(change: _WeightChange, merging: _Merging) -> None:
    site = change.adapters[0].site
    formed = change.form(merging.base)
    _untie(change.module, site.parameter, change.key, merging)
    merging.steps.append(_write(change, formed.merged, merging.into))
    stored = site.weight(torch.float32)
    merging.report.sites.append(
        SiteError(
            change.key,
            relative_change(formed.merged, formed.stored),
            relative_change(stored, formed.merged),
            None if merging.base is None else relative_change(stored, formed.start),
        )
    )
    _merge_bias(change, merging)


def _write(change: _WeightChange, merged: Tensor, into: _Into) -> UndoStep:
    site = change.adapters[0].site
    module, path, storage = change.module, site.parameter, site.storage
    natural = site.ops.from_canonical(module, path, merged)
    if into == "storage" or not storage.is_quantized:
        return write_weight(module, path, storage, natural)
    return make_dense(module, path, storage, natural)


def _merge_bias(change: _WeightChange, merging: _Merging) -> None:
    site = change.adapters[0].site
    path = site.ops.bias(change.module, site.parameter) or "bias"
    owner_path, _, leaf = path.rpartition(".")
    owner = change.module.get_submodule(owner_path)
    b: Tensor | None = getattr(owner, leaf, None)
    start = edited = None if b is None else b.detach()
    for edit in change.edits:
        edited = edit.edited_bias(edited)
    if edited is start or edited is None:
        return
    if b is not None:
        merging.steps.append(overwrite(b, edited))
        return
    reference = next(iter(change.module.parameters()))
    dtype = reference.dtype if reference.is_floating_point() else edited.dtype
    owner.register_parameter(leaf, nn.Parameter(edited.detach().to(dtype), requires_grad=False))
    merging.steps.append(AddedBias(owner, leaf))


def _untie(module: Adapted, path: str, key: str, merging: _Merging) -> None:
    """Give the module a parameter of its own: a write would change the other owner too."""
    parameter = held(module, path)
    if id(parameter) not in merging.tied:
        return
    if mask_of(module, path) is not None:
        raise RuntimeError(
            f"merge {key!r}: expected a weight of its own, got a tied one that torch prunes; make "
            "that permanent first (torch.nn.utils.prune.remove)"
        )
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    owner._parameters[leaf] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    merging.report.untied.append(key)
    merging.steps.append(Untied(owner, leaf, parameter))
