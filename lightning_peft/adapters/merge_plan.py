"""The plan of a merge: adapters by module, and the checks before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.registry import registries_in
from lightning_peft.layers.adapted import Adapted, adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["ModuleMerge", "check_merge", "names_to_merge", "plan_merge"]


@dataclass
class ModuleMerge:
    """The part of a merge that concerns one module.

    Attributes:
        label: Fully qualified name of the module.
        module: The module.
        adapters: Adapters to merge, in the order of the names; may be empty.
    """

    label: str
    module: Adapted
    adapters: list[Adapter]

    def key(self, path: str) -> str:
        """Fully qualified name of a parameter of the module."""
        return f"{self.label}.{path}" if self.label else path

    def edits(self) -> list[WeightAdapter]:
        """The adapters that change weights."""
        return [a for a in self.adapters if isinstance(a, WeightAdapter)]


def names_to_merge(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    """The names given, or the active ones for None, each once.

    Raises:
        KeyError: a name that is not attached.
        RuntimeError: None is given and no adapter is active.
    """
    registries = [r for _, _, r in registries_in(model)]
    known = {n for r in registries for n in r.adapters}
    if names is None:
        wanted = [n for r in registries for n in r.active]
    else:
        wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in known:
            raise KeyError(f"merge: expected one of {sorted(known)}, got {name!r}")
    if not wanted:
        raise RuntimeError(
            "merge: expected an active adapter, found none; name one, or call set_adapter first"
        )
    return list(dict.fromkeys(wanted))


def plan_merge(model: nn.Module, names: Sequence[str]) -> list[ModuleMerge]:
    """The adapters to merge, module by module; modules without any are listed too."""
    return [
        ModuleMerge(label, module, [a for n in names for a in adapters_of(module, n)])
        for label, module in adapted_modules(model)
    ]


def check_merge(plan: Sequence[ModuleMerge], base: Mapping[str, Tensor] | None) -> None:
    """Raise if a module cannot be merged; nothing is changed.

    Raises:
        RuntimeError: a module is merged already, an adapter has no merged form, does not commute
            with one that stays, or needs a bias that the layer cannot hold.
        ValueError: `base` lacks a weight or has one of another shape.
    """
    for part in plan:
        merged = part.module._peft.active.merged
        if merged:
            raise RuntimeError(
                f"merge {part.label!r}: expected unmerged adapters, found {merged}; unmerge first"
            )
        _check_order(part)
        _check_copies(part)
        for adapter in part.adapters:
            _check_mergeable(part, adapter)
    if base is not None:
        for part in plan:
            _check_base(part, base)


def _check_mergeable(part: ModuleMerge, adapter: Adapter) -> None:
    reason = adapter.why_not_mergeable()
    if reason:
        raise RuntimeError(
            f"merge {part.label!r}: {adapter.method.label} has no merged form: {reason}; keep it "
            "attached"
        )
    if isinstance(adapter, WeightAdapter):
        edit = adapter.edit()
        for term in edit.terms:
            term.matrix()  # raises NotMergeable if the change depends on the input
        _check_bias(part, adapter, edit)


def _check_bias(part: ModuleMerge, adapter: WeightAdapter, edit: Edit) -> None:
    site = adapter.site
    if edit.bias is None or site.ops.bias(part.module, site.parameter) is not None:
        return
    if site.is_embedding or site.parameter != "weight":
        raise RuntimeError(
            f"merge {part.label!r}: expected a layer that can hold a bias, got "
            f"{type(part.module).__name__} with a change of its bias by {adapter.method.label}; "
            "keep it attached"
        )


def _check_order(part: ModuleMerge) -> None:
    """Adapters that stay act on the merged weight: they must come last, or be mere sums."""
    acting = list(part.module._peft.active.edits)
    merging = [a for a in acting if a in part.adapters]
    if acting[: len(merging)] == merging:
        return
    for adapter in acting:
        if adapter.edit().form() - {"low_rank", "terms", "bias", "dropout"}:
            raise RuntimeError(
                f"merge {part.label!r}: expected the first of the active adapters "
                f"{[a.adapter_name for a in acting]}, got "
                f"{[a.adapter_name for a in part.adapters]}; "
                f"{adapter.method.label} does not commute with it: merge all, or activate them in "
                "another order"
            )


def _check_copies(part: ModuleMerge) -> None:
    """A trained copy that stays hides the weight that a merge writes."""
    staying = {
        path: adapter
        for adapter in part.module._peft.active.trained_copies
        if adapter not in part.adapters
        for path in adapter.copies()
    }
    for adapter in part.adapters:
        written = set(adapter.copies())
        if isinstance(adapter, WeightAdapter):
            site = adapter.site
            written.add(site.parameter)
            bias = site.ops.bias(part.module, site.parameter)
            if bias and adapter.edit().changes_bias:
                written.add(bias)
        for path in sorted(written & set(staying)):
            other = staying[path]
            raise RuntimeError(
                f"merge {part.key(path)!r}: expected no active trained copy that stays, found that "
                f"of {other.method.label} in {other.adapter_name!r}, which acts in place of the "
                f"weight that {adapter.method.label} would be merged into; merge both"
            )


def _check_base(part: ModuleMerge, base: Mapping[str, Tensor]) -> None:
    for adapter in part.edits():
        site = adapter.site
        key = part.key(site.parameter)
        natural: torch.Size = site.storage.shape(site.module, site.parameter)
        if key not in base or base[key].shape != natural:
            found = list(base[key].shape) if key in base else "no such tensor"
            raise ValueError(f"merge base: expected {key} of shape {list(natural)}, got {found}")
