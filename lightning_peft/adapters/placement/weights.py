"""Placements of edits: the weights that a method's targets name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import nn

from lightning_peft.adapters.placement.placement import WeightPlacement
from lightning_peft.adapters.placement.tied import with_tied
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import in_adapter, matches_suffix
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.layers import editable_ops, parameter_ops
from lightning_peft.layers.experts.ops import is_experts
from lightning_peft.methods.base import WeightMethod
from lightning_peft.models.adaptable_layers import adaptable_layers
from lightning_peft.models.target_modules import Selection, select
from lightning_peft.storage import storage_of
from lightning_peft.storage.unknown import refuse_unknown_format

__all__ = ["find_weight_placements"]

#: Ops of a module whose weights can be edited; looked up once per module.
_OpsOf = Callable[[nn.Module], LayerOps | None]


def find_weight_placements(
    method: WeightMethod, model: nn.Module
) -> tuple[list[WeightPlacement], Selection]:
    """A placement per weight, in the order of `model.named_modules()`.

    Raises:
        ValueError: nothing matches, or the method has no meaning at a site that matched.
    """
    editable = functools.cache(editable_ops)
    method, chosen = _with_single_weights(method, model, editable)
    named = {id(model.get_submodule(name)) for name in chosen}

    @functools.cache
    def ops_of(module: nn.Module) -> LayerOps | None:
        return parameter_ops(module) if id(module) in named else editable(module)

    selection = _without_experts(method, model, _select(method, model, ops_of))
    others = [e for e in method.target_modules or () if e not in chosen] if chosen else []
    if chosen:  # a full name is the end of other layers' names too
        names = (n for n in selection.names if n in chosen or matches_suffix(n, others))
        selection = dataclasses.replace(selection, names=tuple(names))
    placements = []
    for name in selection.names:
        module = model.get_submodule(name)
        ops = ops_of(module)
        assert ops is not None  # `select` asked
        parameters = ops.parameters(module)
        for parameter in chosen.get(name, parameters):
            refuse_unknown_format(module, parameter, name)
            site = Site(module, parameter, name, ops, storage_of(module, parameter))
            slot = "" if len(parameters) == 1 else parameter.replace(".", "_")
            placements.append(WeightPlacement(site, slot))
    if method.adapts_tied:
        placements = with_tied(placements, model, ops_of)
    return _checked(method, model, placements, selection)


def _checked(
    method: WeightMethod,
    model: nn.Module,
    placements: list[WeightPlacement],
    selection: Selection,
) -> tuple[list[WeightPlacement], Selection]:
    """The placements at which the method has a meaning.

    ``"all-linear"`` leaves the others out, with the reason; a layer that is named is refused.
    """
    if method.target_modules != "all-linear":
        return placements, selection  # checked in the plan, but for layers that are trained fully
    fitting: list[WeightPlacement] = []
    unfit: list[tuple[str, str]] = []
    refusal: ValueError | None = None
    for placement in placements:
        try:
            method.check(placement.site)
        except ValueError as error:
            refusal = refusal or error
            unfit.append((placement.name, _reason(error, placement.site.quoted)))
        else:
            fitting.append(placement)
    if refusal is not None and not fitting:
        matched = {placement.name for placement in placements}
        others = adaptable_layers(model, lambda name: name not in matched)
        raise ValueError(f"{refusal}; or name other layers: {others}" if others else str(refusal))
    return fitting, dataclasses.replace(selection, skipped=(*selection.skipped, *unfit))


def _reason(error: ValueError, label: str) -> str:
    """The part of an error that says why, without the layer's name."""
    text = str(error).partition(f"{label}: ")[2] or str(error)
    return text.partition("; ")[0]


def _select(method: WeightMethod, model: nn.Module, ops_of: _OpsOf) -> Selection:
    return select(
        model,
        method.target_modules,
        exclude_modules=method.exclude_modules,
        layers_to_transform=method.layers_to_transform,
        layers_pattern=method.layers_pattern,
        adaptable=lambda module: ops_of(module) is not None,
        kind_hint=method.default_targets,
    )


def _without_experts(method: WeightMethod, model: nn.Module, selection: Selection) -> Selection:
    """The selection without fused experts, for a method with ``experts=None``.

    Raises:
        ValueError: only experts were selected.
    """
    if getattr(method, "experts", "each") is not None:
        return selection
    fused = [n for n in selection.names if is_experts(model.get_submodule(n))]
    names = tuple(n for n in selection.names if n not in fused)
    if not names:
        raise ValueError(
            f"{method.label}(experts=None): expected layers besides experts, got {fused[:3]} "
            "alone; name others in target_modules, or give experts='each'"
        )
    skipped = (*selection.skipped, *((n, "experts=None") for n in fused))
    return dataclasses.replace(selection, names=names, skipped=skipped)


def _with_single_weights(
    method: WeightMethod, model: nn.Module, editable: _OpsOf
) -> tuple[WeightMethod, dict[str, list[str]]]:
    """Resolve entries of `target_modules` that name one weight of a module with several, or of a
    module of no known kind.

    Returns:
        The method with the modules in place of such entries (``experts.down_proj``), and module →
        the weights that were named.
    """
    entries = method.target_modules
    if not isinstance(entries, list | tuple):
        return method, {}
    chosen: dict[str, list[str]] = {}
    used: set[str] = set()
    for name, module in base_modules(model).items():
        ops = parameter_ops(module)
        weights = ops.parameters(module) if ops is not None else ()
        known = editable(module) is not None
        if not name or not weights or (known and len(weights) == 1) or in_adapter(name):
            continue
        # A parameter of an unknown module is named with its module, as no layer is.
        named = entries if known else [e for e in entries if "." in e]
        for weight in weights:
            hits = {e for e in named if matches_suffix(f"{name}.{weight}", [e])}
            if hits:
                chosen.setdefault(name, []).append(weight)
                used |= hits
    if not chosen:
        return method, {}
    # An entry may name a layer elsewhere too (down_proj).
    layers = [n for n, m in base_modules(model).items() if n and n not in chosen and editable(m)]
    kept = [e for e in entries if e not in used or any(matches_suffix(n, [e]) for n in layers)]
    return dataclasses.replace(method, target_modules=[*kept, *chosen]), chosen
