"""Checks of `attach`. They run before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_peft.adapters.placement.placement import PlannedAdapter
from lightning_peft.adapters.placement.unused_rules import check_patterns
from lightning_peft.adapters.quantize import (
    QuantizationPlan,
)
from lightning_peft.core.modules import base_modules, base_parameters, tied_parameters
from lightning_peft.core.names import matches_suffix, nearest_names, quoted
from lightning_peft.core.registry import (
    registries_in,
)
from lightning_peft.core.value_types import shown
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.mixed_batch import BASE
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.methods.method_lists import require_methods
from lightning_peft.models.target_modules import feedforward_targets

__all__ = [
    "check_adapter_name",
    "check_copies_stay_dense",
    "check_free_name",
    "check_starts_can_be_written",
    "check_starts_leave_ties",
    "checked_methods",
    "resolve_methods",
    "saved_modules",
]


def checked_methods(
    model: nn.Module, method: Method | Sequence[Method], modules_to_save: Sequence[str]
) -> list[Method]:
    """The methods, with what they take from the model filled in."""
    _require_parameters(model)
    _require_no_peft_layers(model)
    require_methods(method, "attach(model, {})")
    methods = [method] if isinstance(method, Method) else list(method)
    if not methods and not modules_to_save:
        raise ValueError(
            "attach: expected at least one method or modules_to_save, got none; everything would "
            "be frozen"
        )
    for each in methods:
        check_patterns(each)
    return resolve_methods(methods, model)


def resolve_methods(methods: Sequence[Method], model: nn.Module) -> list[Method]:
    """Return the methods with the fields filled in that they take from the model."""
    feedforward = feedforward_targets(model)
    return [m.resolved(feedforward) if isinstance(m, WeightMethod) else m for m in methods]


def check_adapter_name(name: str) -> None:
    """Raise unless the name can be a key of `nn.ModuleDict`, and a part of a path.

    Raises:
        TypeError: no string.
        ValueError: other characters, an attribute of the class, or the name of the base.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: expected a string, got {shown(name)}; write 'default'")
    if name == BASE:
        raise ValueError(
            f"adapter_name: expected another name than {BASE!r}, by which adapter_names() calls "
            "rows without an adapter; choose another name"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            "adapter_name: expected letters, digits, '_' and '-', and not an attribute of "
            f"nn.ModuleDict, got {name!r}; choose another name"
        )


def check_free_name(model: nn.Module, name: str) -> None:
    """Raise if the name is no valid one or is taken, or if adapters are merged."""
    check_adapter_name(name)
    for _, _, registry in registries_in(model):
        if name in registry.adapters:
            raise RuntimeError(
                f"adapter_name: expected a free name, got {name!r}, which is attached already; "
                "detach it first or choose another name; to go on training a saved adapter, leave "
                "load_adapter out and give PEFT(init_from=directory)"
            )
    if any(module._peft.active.merged for _, module in adapted_modules(model)):
        raise RuntimeError(
            "attach: expected unmerged adapters, found merged ones; call unmerge(model) first"
        )


def _require_parameters(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: expected an nn.Module, got {type(model).__name__}")
    lazy = [n for n, p in base_parameters(model).items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"attach to {type(model).__name__}: expected parameters with a shape, found lazy ones "
            f"({', '.join(lazy[:3])}); run one batch through the model first (under a Trainer: in "
            "the module's __init__ or configure_model)"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"attach to {type(model).__name__}: expected a module with parameters, found none; "
            "build the model first, or give the module that holds it"
        )


def _require_no_peft_layers(model: nn.Module) -> None:
    """Raise ValueError if the model has layers of Hugging Face peft inside."""
    found = [
        f"{name!r} ({type(m).__module__}.{type(m).__name__})"
        for name, m in base_modules(model).items()
        if type(m).__module__.startswith("peft.") and name
    ]
    if found:
        raise ValueError(
            f"attach to {type(model).__name__}: expected a model without adapters of Hugging Face "
            f"peft, found {len(found)} of its layers, such as {found[-1]}; either train with peft "
            "alone and leave PEFT(...) out, or save the adapter with peft's save_pretrained, use "
            "the plain model (peft_model.unload()), and load it with "
            "lightning_peft.load_adapter(model, directory)"
        )


def saved_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Fully qualified names of the modules; a suffix matches at a dot."""
    names = [n for n in base_modules(model) if n]
    found: list[str] = []
    for suffix in wanted:
        hits = [n for n in names if matches_suffix(n, [suffix])]
        if not hits:
            raise ValueError(
                f"modules_to_save: expected a module of this model, got {suffix!r}; nearest names: "
                f"{nearest_names(suffix, names)}"
            )
        found += [h for h in hits if h not in found]
    return found


def check_copies_stay_dense(
    planned: Sequence[PlannedAdapter], packing: QuantizationPlan | None
) -> None:
    """Raise ValueError if a weight that gets a trained copy is to be quantised."""
    packed = {} if packing is None else {id(m): layout.names for _, m, layout in packing.layers}
    for each in planned:
        placement = each.placement
        if set(packed.get(id(placement.module), ())) & set(placement.paths):
            raise ValueError(
                f"{each.method.label} on {quoted(placement.name)}: expected a dense weight to "
                "train a copy of, got one that is to be quantised; exclude it from the "
                "quantization, or use an adapter"
            )


def check_starts_can_be_written(
    planned: Sequence[PlannedAdapter], packing: QuantizationPlan | None
) -> None:
    """Raise ValueError if a start rewrites a weight that its released format would round."""
    packed = () if packing is None else packing.layers
    transcoded = {id(m) for _, m, _ in packed}
    for each in planned:
        method, placement = each.method, each.placement
        if not isinstance(method, WeightMethod) or not method.rewrites_base:
            continue
        storage = placement.site.storage
        if storage.exports and id(placement.module) not in transcoded:
            raise ValueError(
                f"{method.label} on {quoted(placement.name)}: expected a base that the start can "
                f"rewrite without loss, got {storage.label}, which rounds the residual; use "
                "init='default', or transcode the base with quantization='nf4'"
            )


def check_starts_leave_ties(model: nn.Module, planned: Sequence[PlannedAdapter]) -> None:
    """Raise ValueError if a start takes a part out of a weight that another module reads too."""
    moving = [
        (p.method, p.placement)
        for p in planned
        if isinstance(p.method, WeightMethod)
        and (p.method.rewrites_base or p.method.needs_data.moves_base)
    ]
    if not moving:
        return
    readers = {
        (id(place.module), place.key): [each.name for each in group if each is not place]
        for group in tied_parameters(model)
        for place in group
    }
    for method, placement in moving:
        others = readers.get((id(placement.module), placement.site.parameter))
        if others:
            raise ValueError(
                f"{method.label} on {quoted(placement.name)}: expected a weight of its own, for "
                f"the start takes a part out of it, got one that is also {quoted(others[0])}; "
                "exclude the layer, untie the two, or use a start that leaves the base alone"
            )
