"""Merging of one module: edits and trained copies into its weights, then a comparison of outputs.

Edits act on trained copies, in the forward and here: W' = edits(copy), or edits(W) without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lightning_peft.adapters.merge_check import OutputCheck
from lightning_peft.adapters.merge_plan import ModuleMerge
from lightning_peft.adapters.merge_report import MergeReport, SiteError
from lightning_peft.adapters.merge_undo import (
    AddedBias,
    Untied,
    make_dense,
    overwrite,
    write_weight,
)
from lightning_peft.core.edit import Edit, apply_edits
from lightning_peft.core.modules import own_tensor, parameter_at
from lightning_peft.core.pruning_masks import held, mask_of
from lightning_peft.layers.adapted import Adapted, refresh
from lightning_peft.layers.adapted_state import UndoStep
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.models.outputs import relative_change

__all__ = ["Into", "MergeSettings", "check_finite", "merge_module"]

Into = Literal["dense", "storage"]


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge, and its report.

    Attributes:
        names: Adapters to merge.
        into: Whether a quantised weight becomes dense or is requantised.
        base: Dense weights to merge onto, None for the stored ones.
        tied: Ids of the parameters that several modules hold.
        report: The report; extended in place.
    """

    names: list[str]
    into: Into
    base: Mapping[str, Tensor] | None
    tied: set[int]
    report: MergeReport = field(default_factory=MergeReport)


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
        edits: Their edits, formed before any write, because DoRA reads W.
        copy: Trained copy that the edits act on; None if they act on the base.
    """

    module: Adapted
    key: str
    adapters: list[WeightAdapter]
    edits: list[Edit]
    copy: Tensor | None

    def form(self, base: Mapping[str, Tensor] | None) -> _Formed:
        """Return the weight with all edits.

        Raises:
            RuntimeError: it is not finite.
        """
        site = self.adapters[0].site
        W = start = site.weight(site.wide_dtype).clone()  # dense storage is read without a copy
        given = self.copy if base is None or self.copy is not None else base[self.key]
        if given is not None:
            given = given.detach().to(W)
            start = site.ops.to_canonical(self.module, site.parameter, given)
        merged = apply_edits(site, self.edits, start)
        _require_finite(self.key, merged)
        return _Formed(W, start, merged)


def _require_finite(key: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise RuntimeError(
            f"merge {key!r}: expected finite values, got NaN or infinity; nothing was changed here"
        )


def copies_to_merge(part: ModuleMerge) -> dict[str, Tensor]:
    """Return the trained copies by path; the last one named acts."""
    return {path: value for a in part.adapters for path, value in a.copies().items()}


def _changes(part: ModuleMerge, copies: Mapping[str, Tensor]) -> list[_WeightChange]:
    """Return the edits by weight."""
    by_path: dict[str, list[WeightAdapter]] = {}
    for adapter in part.edits():
        by_path.setdefault(adapter.site.parameter, []).append(adapter)
    return [
        _WeightChange(
            part.module, part.key(path), group, [a.edit() for a in group], copies.get(path)
        )
        for path, group in by_path.items()
    ]


def check_finite(part: ModuleMerge, base: Mapping[str, Tensor] | None) -> None:
    """Raise if a merged weight, bias or copy would not be finite; nothing is changed.

    Raises:
        RuntimeError: with the parameter's name.
    """
    copies = copies_to_merge(part)
    for path, value in copies.items():
        _require_finite(part.key(path), value)
    for change in _changes(part, copies):
        change.form(base)
        path, b = _edited_bias(change, copies)
        if b is not None:
            _require_finite(part.key(path), b)


def merge_module(part: ModuleMerge, settings: MergeSettings, steps: list[UndoStep]) -> None:
    """Write the merged weights of one module, let it run without the adapters, and compare.

    Args:
        part: The module and its adapters.
        settings: Settings and report.
        steps: Changes made to the module so far; extended in place, each before it is made.

    Raises:
        RuntimeError: a value is not finite, or the module's output is not as before.
    """
    module, report = part.module, settings.report
    check = OutputCheck(part, compares=settings.base is None)
    copies = copies_to_merge(part)
    changes = _changes(part, copies)
    biases = [_edited_bias(change, copies) for change in changes]
    errors = [_merge_weight(change, settings, steps) for change in changes]
    written = {change.adapters[0].site.parameter for change in changes}
    for path, edited in biases:
        if edited is not None:
            _write_bias(module, part.key(path), path, edited, steps)
            written.add(path)
    for path, value in copies.items():
        if path not in written:
            _require_finite(part.key(path), value)
            _untie(module, path, part.key(path), settings, steps)
            overwrite(parameter_at(module, path), value, steps)
    for adapter in part.adapters:
        for path, value in adapter.substitutes().items():
            if path not in copies:  # running statistics
                overwrite(module.get_buffer(path), value, steps)
    module._peft.active.merged = [n for n in settings.names if n in module.peft]
    refresh(module)
    requantised = [
        e.error
        for change, e in zip(changes, errors, strict=True)
        if change.adapters[0].site.storage.is_quantized
    ]
    loss = max(requantised, default=0.0)
    report.sites += errors
    report.note_output(part.label, check.difference(loss), bool(part.adapters))


def _merge_weight(
    change: _WeightChange, settings: MergeSettings, steps: list[UndoStep]
) -> SiteError:
    site = change.adapters[0].site
    formed = change.form(settings.base)
    _untie(change.module, site.parameter, change.key, settings, steps)
    _write(change, formed.merged, settings.into, steps)
    stored = site.weight(site.wide_dtype)
    kept, noise = _survival(stored, formed) if site.storage.is_quantized else (None, None)
    return SiteError(
        change.key,
        relative_change(formed.merged, formed.stored),
        relative_change(stored, formed.merged),
        None if settings.base is None else relative_change(stored, formed.start),
        kept,
        noise,
    )


def _survival(stored: Tensor, formed: _Formed) -> tuple[float | None, float | None]:
    """How much of the update a requantised weight keeps, and the noise it adds."""
    update = formed.merged - formed.stored
    size = float(update.square().sum())
    if size == 0:
        return None, None
    kept = float(((stored - formed.stored) * update).sum()) / size
    return kept, float((stored - formed.merged).norm()) / size**0.5


def _write(change: _WeightChange, merged: Tensor, into: Into, steps: list[UndoStep]) -> None:
    site = change.adapters[0].site
    module, path, storage = change.module, site.parameter, site.storage
    natural = site.ops.from_canonical(module, path, merged)
    if into == "storage" or not storage.is_quantized:
        write_weight(module, path, storage, natural, steps)
    else:
        make_dense(module, path, storage, natural, steps)


def _edited_bias(change: _WeightChange, copies: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """Return the bias's path, and the bias with all edits; None if they leave it as it is."""
    site = change.adapters[0].site
    path = site.ops.bias(change.module, site.parameter) or "bias"
    owner_path, _, leaf = path.rpartition(".")
    b = copies.get(path, own_tensor(change.module.get_submodule(owner_path), leaf))
    start = edited = None if b is None else b.detach()
    for edit in change.edits:
        edited = edit.edited_bias(edited)
    return path, None if edited is start else edited


def _write_bias(
    module: Adapted, key: str, path: str, edited: Tensor, steps: list[UndoStep]
) -> None:
    _require_finite(key, edited)
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    held_bias = owner._parameters.get(leaf)
    if held_bias is not None:
        overwrite(held_bias, edited, steps)
        return
    reference = next(iter(module.parameters()))
    dtype = reference.dtype if reference.is_floating_point() else edited.dtype
    steps.append(AddedBias(owner, leaf))
    owner.register_parameter(leaf, nn.Parameter(edited.detach().to(dtype), requires_grad=False))


def _untie(
    module: Adapted, path: str, key: str, settings: MergeSettings, steps: list[UndoStep]
) -> None:
    """Give the module a parameter of its own: a write would change the other owner too."""
    parameter = held(module, path)
    if id(parameter) not in settings.tied:
        return
    if mask_of(module, path) is not None:
        raise RuntimeError(
            f"merge {key!r}: expected a weight of its own, got a tied one that torch prunes; make "
            "that permanent first (torch.nn.utils.prune.remove)"
        )
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    steps.append(Untied(owner, leaf, parameter))
    owner._parameters[leaf] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    settings.report.untied.append(key)
