"""Merge edits into the weights, and take them out again bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.activation import disable_adapters
from lightning_peft.adapters.intact import check_intact
from lightning_peft.adapters.merge_module import Into, MergeSettings, check_finite, merge_module
from lightning_peft.adapters.merge_plan import ModuleMerge, check_merge, names_to_merge, plan_merge
from lightning_peft.adapters.merge_report import MergeReport, SiteError
from lightning_peft.adapters.merge_undo import Untied, UntiedConfig
from lightning_peft.adapters.snapshot import ModelSnapshot
from lightning_peft.core.modules import ParameterPlace, tied_parameters
from lightning_peft.core.value_types import shown
from lightning_peft.layers.adapted import Adapted, adapted_modules, refresh
from lightning_peft.layers.adapted_state import MergeUndo, UndoStep
from lightning_peft.models.outputs import output_of, relative_change
from lightning_peft.models.packed_state import is_released
from lightning_peft.models.quantized_config import QuantizationNotes

__all__ = ["MergeReport", "SiteError", "merge", "unmerge"]


def merge(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    into: Into = "dense",
    keep_base: bool = True,
    base: Mapping[str, Tensor] | None = None,
    batch: object = None,
) -> MergeReport:
    """Write W' into the weights, in fp32 and with one rounding; forward then runs the plain layers.

    The adapters stay attached, so that `unmerge` can take the change back, and layers that no
    adapter changes stay packed. After it `save_pretrained` of a transformers model writes plain
    weights; `merge_and_unload` makes the model itself plain.

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
        RuntimeError: adapters are merged already, a method has no merged form, W' is not finite, or
            a layer's output on a random input is not as before. With the base kept, the model is
            then as before, bit for bit. Without it, each module is merged or as before; both sets
            are named, and a second call merges the rest.
        ValueError: ``base`` lacks a weight or has another shape; ``into`` is unknown.
    """
    if into not in ("dense", "storage"):
        raise ValueError(f"merge: into: expected 'dense' or 'storage', got {shown(into)}")
    check_intact(model, "merge")
    wanted = names_to_merge(model, names)
    plan = plan_merge(model, wanted)
    if not keep_base:  # an earlier call failed halfway, and its modules stay merged
        plan = [part for part in plan if not _is_merged(part, wanted)]
    check_merge(plan, base)
    ties = tied_parameters(model)
    tied = {id(first.module._parameters[first.key]) for first, *_ in ties}
    if batch is None:
        return _merge_all(model, plan, MergeSettings(wanted, into, base, tied), keep_base, ties)
    before = output_of(model, batch)
    with disable_adapters(model):
        plain = output_of(model, batch)
    errors = {}
    if base is not None:
        _merge_all(model, plan, MergeSettings(wanted, into, None, tied), True, ties)
        errors["dequantized"] = relative_change(output_of(model, batch), before)
        unmerge(model)
    report = _merge_all(model, plan, MergeSettings(wanted, into, base, tied), keep_base, ties)
    report.output_error = relative_change(output_of(model, batch), before)
    report.output_change = relative_change(before, plain)
    if base is not None:
        report.output_errors = {**errors, "original": report.output_error}
    return report


def _is_merged(part: ModuleMerge, names: Sequence[str]) -> bool:
    merged = part.module._peft.active.merged
    undo = part.module._peft.merge_undo
    wanted = [n for n in names if n in part.module.peft]
    return merged == wanted and undo is not None and not undo.base_kept


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
    plan: Sequence[ModuleMerge],
    settings: MergeSettings,
    keep_base: bool,
    ties: Sequence[Sequence[ParameterPlace]],
) -> MergeReport:
    """Merge every module.

    If one fails and the base is kept, all that was written is taken back. Without the base, that
    module is taken back, and the modules before it stay merged.
    """
    snapshot = ModelSnapshot(model) if keep_base else None
    released = is_released(model)
    done: list[ModuleMerge] = []
    try:
        with torch.no_grad():
            if not keep_base:  # nothing could be taken back, so all is checked before any write
                for part in plan:
                    check_finite(part, settings.base)
            for part in plan:
                _merge_part(part, settings, keep_base)
                done.append(part)
            if released and settings.into == "dense" and plan:
                _keep_undo(plan[-1].module, [QuantizationNotes.take(model)])
            if settings.report.untied:
                _untie_configs(model, plan[-1].module, ties)
        _warn_of_noise(settings.report)  # a warning may be an error: all is taken back then too
    except BaseException as error:
        if snapshot is not None:
            for part in reversed(plan):
                _undo(part.module)
            snapshot.restore()
            raise
        merged, rest = ([p.label for p in parts] for parts in (done, plan[len(done) :]))
        if isinstance(error, Exception) and done:
            raise RuntimeError(
                f"{error}; merged for good: {merged}; not merged: {rest}; the model runs, and a "
                "second call merges the rest"
            ) from error
        raise
    return settings.report


def _warn_of_noise(report: MergeReport) -> None:
    lost = report.lost
    if lost:
        worst = max(lost, key=lambda s: s.noise or 0.0)
        warnings.warn(
            f"merge into='storage': requantising added more noise than the update has in "
            f"{len(lost)} of {len(report.sites)} weights (worst: {worst.name}, {worst.noise:.1f} "
            "times the update); use into='dense', or keep the adapter beside the base",
            stacklevel=4,
        )


def _merge_part(part: ModuleMerge, settings: MergeSettings, keep_base: bool) -> None:
    """Merge one module, or leave it as it was."""
    state = part.module._peft
    before, undo = list(state.active.merged), MergeUndo()
    state.merge_undo = undo
    try:
        merge_module(part, settings, undo.steps)
    except BaseException:
        _undo(part.module)
        state.active.merged = before
        refresh(part.module)
        raise
    if not keep_base:
        state.merge_undo = MergeUndo(base_kept=False)
    elif not undo.steps:
        state.merge_undo = None


def _untie_configs(
    model: nn.Module, holder: Adapted, ties: Sequence[Sequence[ParameterPlace]]
) -> None:
    """Clear the flag by which Hugging Face ties embeddings again when it loads the merged model.

    Without the flag, transformers ties nothing on loading, and it writes a shared tensor only once.
    Places of a group that still share a tensor therefore get copies of their own.
    """
    tied: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) is True:
            tied[id(config)] = config
    for config in tied.values():
        _keep_undo(holder, [UntiedConfig(config)])
        config.tie_word_embeddings = False
    for group in ties if tied else ():
        _keep_undo(holder, _separated(group))


def _keep_undo(holder: Adapted, steps: Sequence[UndoStep]) -> None:
    """Let `unmerge` take back changes outside of the layers as well."""
    if steps:
        undo = holder._peft.merge_undo or MergeUndo()
        undo.steps += steps
        holder._peft.merge_undo = undo


def _separated(group: Sequence[ParameterPlace]) -> list[UndoStep]:
    """Give every place of a group a tensor of its own, if they differ already."""
    held = [place.module._parameters[place.key] for place in group]
    if len({id(parameter) for parameter in held}) == 1:
        return []
    steps: list[UndoStep] = []
    seen: set[int] = set()
    for place, parameter in zip(group, held, strict=True):
        if parameter is not None and id(parameter) in seen:
            steps.append(Untied(place.module, place.key, parameter))
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            place.module._parameters[place.key] = copy
        seen.add(id(parameter))
    return steps
