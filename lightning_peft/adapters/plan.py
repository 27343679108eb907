"""The plan of an attach: which adapters go where. Planning changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_peft.adapters.placement.checks import check_swappable
from lightning_peft.adapters.placement.find import find_placements
from lightning_peft.adapters.placement.placement import Placement, PlannedAdapter
from lightning_peft.core.names import quoted
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.methods.modules_to_save import ModulesToSave, TrainedBias
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.models.adaptable_layers import adaptable_layers
from lightning_peft.models.frozen_parts import frozen_parts, inside, names_part
from lightning_peft.models.pretrained import pretrained_models

__all__ = ["AttachPlan", "plan_attach"]


_FROZEN = "frozen before attach; name it in target_modules to adapt it"


@dataclass
class AttachPlan:
    """The adapters that `attach` will build.

    Attributes:
        adapters: Planned adapters, in order of building.
        skipped: (name, reason) of layers that matched and are left out.
        tied: Groups of parameter names that share one tensor.
        frozen_parts: Names of the parts that the user froze before attach.
        left_frozen: Those of them that get no adapter, without parts of a pretrained model, which
            are its base.
    """

    adapters: list[PlannedAdapter] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    frozen_parts: list[str] = field(default_factory=list)
    left_frozen: list[str] = field(default_factory=list)


def plan_attach(
    model: nn.Module,
    methods: Sequence[Method],
    saved: Sequence[str],
    separate_copies: bool = False,
) -> AttachPlan:
    """Plan the adapters of `methods` and the trained copies of the modules in `saved`.

    With `separate_copies`, each of these modules gets its own copy of a tensor that they share.

    Raises:
        ValueError: nothing matches but layers in `saved`, a method has no meaning at a layer, or a
            class swap would have no effect on a module.
    """
    plan = AttachPlan()
    frozen = plan.frozen_parts = frozen_parts(model)
    for i, method in enumerate(methods):
        _add_method(plan, model, method, str(i) if len(methods) > 1 else "", saved, frozen)
    if saved:
        copies = ModulesToSave(modules=tuple(saved), tied=not separate_copies)
        overlap = any(_lies_in(p.placement.name, saved) for p in plan.adapters)
        placed = find_placements(copies, model)[0]
        _check_parts(plan, placed, saved)
        plan.adapters += [PlannedAdapter(copies, "saved" if overlap else "", p) for p in placed]
    for method in methods:  # after the copies, whose own refusal says more
        if isinstance(method, WeightMethod) and not any(p.method is method for p in plan.adapters):
            found = [p.name for p in find_placements(method, model)[0]]
            raise ValueError(_all_trained_whole(method, model, found, saved))
    models = pretrained_models(model) if frozen else {}
    plan.left_frozen = [
        part
        for part in frozen
        if not any(inside(p.placement.name, [part]) for p in plan.adapters)
        and not any(part != name and inside(part, [name]) for name in models)
    ]
    for planned in plan.adapters:
        check_swappable(planned.placement.name, planned.placement.module)
    return plan


def _add_method(
    plan: AttachPlan,
    model: nn.Module,
    method: Method,
    key: str,
    saved: Sequence[str],
    frozen: Sequence[str],
) -> None:
    """Add one method, without the layers that are trained as a whole, and its trained biases.

    Parts that the user froze get no adapters, unless the method's targets name them or match
    nothing else than layers that are trained as a whole.
    """
    found, selection = find_placements(method, model)
    targets = getattr(method, "target_modules", None)
    unnamed = [part for part in frozen if not names_part(targets, part)]
    if any(not inside(p.name, unnamed) and not _lies_in(p.name, saved) for p in found):
        left_out = [part for part in unnamed if any(inside(p.name, [part]) for p in found)]
        plan.skipped += [(part, _FROZEN) for part in left_out]
        found = [p for p in found if not inside(p.name, unnamed)]
    else:
        unnamed = []
    if isinstance(method, TrainableTokens):
        _check_tokens(method, [p.name for p in found], saved, plan)
    kept = [p for p in found if not _lies_in(p.name, saved)]
    plan.skipped += [
        (p.name, "trained whole (modules_to_save)") for p in found if _lies_in(p.name, saved)
    ]
    if selection is not None:
        plan.skipped += list(selection.skipped)
        plan.tied = list(selection.tied)
    if isinstance(method, WeightMethod) and targets != "all-linear":
        for placement in kept:
            method.check(placement.site)
    plan.adapters += [PlannedAdapter(method, key, p) for p in kept]
    tokens = method.trained_tokens() if isinstance(method, WeightMethod) else None
    if tokens is not None:
        _add_method(plan, model, TrainableTokens(tokens), f"{key}tokens", saved, frozen)
    which = method.trained_biases() if isinstance(method, WeightMethod) else "none"
    if which != "none":
        biases = TrainedBias(modules=None if which == "all" else tuple(p.name for p in kept))
        plan.adapters += [
            PlannedAdapter(biases, "biases", p)
            for p in find_placements(biases, model)[0]
            if not inside(p.name, unnamed) and not _lies_in(p.name, saved)
        ]


def _check_tokens(
    method: TrainableTokens, names: Sequence[str], saved: Sequence[str], plan: AttachPlan
) -> None:
    """Raise ValueError if an embedding with trained rows is adapted or trained whole as well."""
    whole = [n for n in names if _lies_in(n, saved)]
    adapted = [p.placement.name for p in plan.adapters if p.placement.name in names]
    for found, how in ((whole, "is in modules_to_save"), (adapted, "has another adapter")):
        if found:
            raise ValueError(
                f"{method.label}: expected an embedding that is not trained otherwise, got "
                f"{found[0]!r}, which {how}; choose one of the two"
            )


def _check_parts(plan: AttachPlan, copies: Sequence[Placement], saved: Sequence[str]) -> None:
    """Raise ValueError if a part of an adapted layer is trained whole: an attention's out_proj."""
    modules = {id(p.module): p for p in copies}
    for planned in plan.adapters:
        name, copy = planned.placement.name, modules.get(id(planned.placement.module))
        if copy is None or not isinstance(planned.method, WeightMethod) or _lies_in(name, saved):
            continue
        parts = [m for m in saved if m.startswith(f"{name}.")]
        raise ValueError(
            f"{planned.method.label}: expected layers without parts that are trained whole "
            f"(modules_to_save), got {quoted(name)}, which reads {quoted(parts[0])} itself; "
            "exclude the layer, or leave the part out"
        )


def _all_trained_whole(
    method: WeightMethod, model: nn.Module, found: Sequence[str], saved: Sequence[str]
) -> str:
    others = adaptable_layers(model, lambda name: not _lies_in(name, saved))
    return (
        f"{method.label} target_modules: expected a layer that is not trained whole "
        f"(modules_to_save), got {method.target_modules!r}, which matches only "
        f"{', '.join(found[:5])}; name other layers ({others or 'there are none'}), or leave "
        f"{method.label} out and "
        f"give modules_to_save={list(saved)} alone"
    )


def _lies_in(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of `modules` or lies in one."""
    return any(name == m or name.startswith(f"{m}.") for m in modules)
