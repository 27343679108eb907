"""Where the adapters of a method go: its sites, found and checked before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_peft.adapters.placement.blocks import block_site, block_width, find_block_placements
from lightning_peft.adapters.placement.prompts import (
    attention_site,
    find_custom_prompt_placement,
    find_prompt_placements,
)
from lightning_peft.core.site import Site
from lightning_peft.layers import PLAIN, ops_for
from lightning_peft.layers.adapted import Adapted
from lightning_peft.layers.experts.ops import is_experts
from lightning_peft.layers.prompt.multihead_attention import refusal
from lightning_peft.methods.base import Method
from lightning_peft.models.target_modules import Selection, block_rule, name_rule, select
from lightning_peft.storage import storage_of

__all__ = ["Placement", "adaptable", "place"]


@dataclass
class Placement:
    """One adapter to be made.

    Attributes:
        name: Fully qualified name of the module.
        module: The module whose class will be swapped.
        site: The weight, or for copies and blocks the module itself with its main parameter.
        slot: Key among several adapters of one name on one module; "" where there is one.
        paths: For trained copies: paths of the parameters.
        tap: For added modules: the module whose input they read, where it is not their own; for
            prompts: the decoder that attends to them.
    """

    name: str
    module: nn.Module
    site: Site
    slot: str = ""
    paths: tuple[str, ...] = ()
    tap: nn.Module | None = None


def adaptable(module: nn.Module) -> bool:
    """Whether weights of this module can be edited in place."""
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return False  # MultiheadAttention's out_proj: its forward is never called
    return ops_for(module) is not None and not parametrize.is_parametrized(module)


def place(model: nn.Module, method: Method) -> tuple[list[Placement], Selection | None]:
    """All placements of a method, in the order of `model.named_modules()`.

    Raises:
        ValueError: nothing matches, or the method has no meaning at a site that matched.
    """
    return _PLACERS[method.kind](model, method)


def _site(model_name: str, module: nn.Module, parameter: str) -> Site:
    return Site(
        module, parameter, model_name, ops_for(module) or PLAIN, storage_of(module, parameter)
    )


def _place_weight(model: nn.Module, method: Any) -> tuple[list[Placement], Selection]:
    method, chosen = _single_weights(model, method)
    selection = _without_experts(model, method, _select(model, method))
    placements = []
    for name in selection.names:
        module = model.get_submodule(name)
        ops = ops_for(module)
        assert ops is not None  # `adaptable` said so
        parameters = ops.parameters(module)
        for parameter in chosen.get(name, parameters):
            slot = "" if len(parameters) == 1 else parameter.replace(".", "_")
            site = _site(name, module, parameter)
            method.check(site)
            placements.append(Placement(name, module, site, slot))
    return placements, selection


def _without_experts(model: nn.Module, method: Any, selection: Selection) -> Selection:
    """Fused experts left out where the method says ``experts=None``.

    Raises:
        ValueError: nothing else was chosen.
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


def _single_weights(model: nn.Module, method: Any) -> tuple[Any, dict[str, list[str]]]:
    """Entries of `target_modules` that name one weight of a module with several
    (``experts.down_proj``): the method with the modules instead, and module → those weights.
    """
    entries = method.target_modules
    if not isinstance(entries, list | tuple):
        return method, {}
    chosen: dict[str, list[str]] = {}
    used: set[str] = set()
    for name, module in model.named_modules():
        ops = ops_for(module) if adaptable(module) else None
        weights = ops.parameters(module) if ops is not None else ()
        if len(weights) < 2 or _inside_peft(name):
            continue
        for weight in weights:
            full = f"{name}.{weight}"
            hits = {e for e in entries if full == e or full.endswith(f".{e}")}
            if hits:
                chosen.setdefault(name, []).append(weight)
                used |= hits
    if not chosen:
        return method, {}
    # An entry may name a layer elsewhere too (down_proj).
    layers = [n for n, m in model.named_modules() if n and n not in chosen and adaptable(m)]
    kept = [
        e for e in entries if e not in used or any(n == e or n.endswith(f".{e}") for n in layers)
    ]
    return dataclasses.replace(method, target_modules=[*kept, *chosen]), chosen


def _select(model: nn.Module, method: Any) -> Selection:
    return select(
        model,
        method.target_modules,
        exclude_modules=method.exclude_modules,
        layers_to_transform=method.layers_to_transform,
        adaptable=adaptable,
        kind_hint=method.default_targets,
    )


def _place_block(model: nn.Module, method: Any) -> tuple[list[Placement], Selection | None]:
    if method.target_modules is None:
        inside = _chosen(model, method)
        found = [e for e in find_block_placements(model, method) if inside(e[0].name)]
        return [Placement(s.name, s.module, s, tap=tap) for s, tap in found], None
    selection = select(
        model,
        method.target_modules,
        exclude_modules=method.exclude_modules,
        layers_to_transform=method.layers_to_transform,
        adaptable=lambda m: bool(block_width(m)),
        kind_hint=method.default_targets,
    )
    role = "beside" if method.where == "beside" else "output"
    sites = [block_site(n, model.get_submodule(n), role) for n in selection.names]
    return [Placement(s.name, s.module, s) for s in sites], selection


def _place_sequence(model: nn.Module, method: Any) -> tuple[list[Placement], Selection | None]:
    if method.target_modules is None:
        site, follower = find_prompt_placements(model, method)
        return [Placement(site.name, site.module, site, tap=follower)], None
    if method.acts != "attention":
        site = find_custom_prompt_placement(model, method)
        return [Placement(site.name, site.module, site, tap=model)], None
    selection = select(
        model,
        method.target_modules,
        exclude_modules=method.exclude_modules,
        layers_to_transform=method.layers_to_transform,
        adaptable=lambda m: not refusal(m),
    )
    sites = [attention_site(n, model.get_submodule(n)) for n in selection.names]
    return [Placement(s.name, s.module, s) for s in sites], selection


def _place_select(model: nn.Module, method: Any) -> tuple[list[Placement], None]:
    selects, inside = method.choice(model), _chosen(model, method)
    placements = []
    for name, module in model.named_modules():
        if _inside_peft(name) or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        paths = []
        for path, parameter in _read_parameters(module):
            full = f"{name}.{path}" if name else path
            if not inside(name) or not selects(full, parameter, module):
                continue
            if storage_of(module, path).label != "dense" and path.endswith("weight"):
                raise ValueError(
                    f"{method.label} on {full!r}: expected a dense weight to train a copy of, got "
                    f"{storage_of(module, path).label}; a quantised weight takes no gradient: "
                    "exclude it, or use an adapter"
                )
            if parameter.is_floating_point():
                paths.append(path)
        if paths:
            site = Site(
                module, paths[0], name, ops_for(module) or PLAIN, storage_of(module, paths[0])
            )
            placements.append(Placement(name, module, site, paths=tuple(paths)))
    if not placements and not method.may_be_empty:
        raise ValueError(
            f"{method.label}: expected at least one parameter to train, found none that it selects "
            f"in {type(model).__name__}; choose another method or widen its choice"
        )
    return placements, None


def _chosen(model: nn.Module, method: Any) -> Callable[[str], bool]:
    """Whether a module lies in (or is) one of those that a method's targets name; all by default.

    Raises:
        ValueError: a layer index beyond the model's blocks.
    """
    modules = [(n, m) for n, m in model.named_modules() if not _inside_peft(n)]
    wanted, excluded = name_rule(method.target_modules), name_rule(method.exclude_modules)
    blocks = block_rule(modules, method.layers_to_transform)

    def inside(name: str) -> bool:
        parts = name.split(".")
        parents = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        named = method.target_modules is None or any(map(wanted, parents))
        return named and blocks(name) and not any(map(excluded, parents))

    return inside


def _read_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that this module's own forward reads: its own, and those of children it never
    calls.
    """
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return []  # read by its parent
    own = [(n, p) for n, p in module.named_parameters(recurse=False)]
    if isinstance(module, nn.MultiheadAttention):
        own += [(f"out_proj.{n}", p) for n, p in module.out_proj.named_parameters(recurse=False)]
    return own


def _inside_peft(name: str) -> bool:
    return "peft" in name.split(".")


def _main_parameter(module: nn.Module) -> str:
    return next((n for n, _ in module.named_parameters(recurse=False)), "weight")


_PLACERS: dict[str, Callable[[nn.Module, Any], tuple[list[Placement], Selection | None]]] = {
    "weight": _place_weight,
    "block": _place_block,
    "select": _place_select,
    "sequence": _place_sequence,
}


def refuse_unfit(placement: Placement) -> None:
    """Raise before anything changes where a class swap would not take effect or would harm.

    Raises:
        ValueError: the module has an attribute ``peft`` of its own, is parametrised, or has an
            instance ``forward``.
    """
    module, name = placement.module, placement.name
    if isinstance(module, Adapted):
        return
    if hasattr(module, "peft"):
        raise ValueError(
            f"{name!r}: expected a module without an attribute named 'peft', found "
            f"{type(module.peft).__name__}; rename it, or exclude the module"
        )
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"{name!r}: expected a module that is not parametrised, found "
            f"{list(module.parametrizations)} under torch.nn.utils.parametrize; "  # type: ignore[arg-type]
            "remove the parametrisation first, or exclude the module"
        )
    forward = vars(module).get("forward")
    if forward is not None and "_old_forward" not in vars(module):
        raise ValueError(
            f"{name!r}: expected the class's own forward, found an instance attribute 'forward' "
            f"from {getattr(forward, '__module__', type(forward).__module__)}; it would bypass the "
            "adapter: undo that patch before attaching"
        )
