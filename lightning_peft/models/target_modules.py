"""Selection of the layers to adapt: all-linear, suffixes, a pattern, or the usual ones.

The selection uses names, a predicate for adaptable modules, and the `config.model_type` of Hugging
Face models anywhere inside the root. Layers whose weight is read directly by another module are
never selected: an adapter there would have no effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_peft.core.modules import base_modules, is_conv1d, tied_parameters
from lightning_peft.core.names import (
    join,
    matches_suffix,
    with_parents,
)
from lightning_peft.layers import ops_for, uneditable
from lightning_peft.layers.experts.ops import experts_refusal
from lightning_peft.models.modules import head_names, hf_models
from lightning_peft.models.parts import Part, chosen_parts, parts_of
from lightning_peft.models.target_errors import no_match
from lightning_peft.models.target_rules import block_rule, name_rule
from lightning_peft.models.target_table import MODEL_TYPES, Family

__all__ = [
    "Selection",
    "bypassed",
    "default_targets",
    "feedforward_targets",
    "select",
]

#: Routers by the end of their name: choosing experts is not what an adapter should change unasked.
_ROUTERS = ("router", "gate", "shared_expert_gate", "router.classifier", "router.layer")


@dataclass(frozen=True)
class Selection:
    """The modules that a rule selects.

    Attributes:
        names: Fully qualified module names in the order of `named_modules()`, each module once.
        skipped: (name, reason) of modules that matched and were left out.
        tied: Groups of parameter names that share one tensor.
    """

    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()


def select(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    *,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    adaptable: Callable[[nn.Module], bool],
    kind_hint: str = "lora",
) -> Selection:
    """Select modules.

    Args:
        model: The root; names are relative to it.
        target_modules: ``"all-linear"``; a list of names or suffixes (at a dot); a regular
            expression for full names; the usual choice in a part of a vision-language model,
            ``"language"``, ``"vision"`` or ``"language+vision"``; or None for the architecture's
            usual choice. None and ``"all-linear"`` select the root itself if it can be adapted.
        exclude_modules: A list, a regular expression, or a part, as above.
        layers_to_transform: Indices of the repeated blocks.
        layers_pattern: Names of the lists they count in; None means the outermost lists.
        adaptable: Tells if a module's weights can be edited.
        kind_hint: ``"lora"`` or ``"ia3"``: the column of the architectures' table.

    Raises:
        ValueError: no module matches, with the nearest names; or the table lacks the
            architecture.
    """
    modules = list(base_modules(model).items())
    tied = tuple(tuple(place.name for place in group) for group in tied_parameters(model))
    if target_modules in (None, "all-linear") and adaptable(model):
        return Selection(("",), (), tied)
    matches = _matcher(model, target_modules, kind_hint, modules, adaptable)
    blocks = block_rule(modules, layers_to_transform, layers_pattern)
    matched = _matched(model, modules, matches, exclude_modules, blocks)
    fitting, unfit = _fitting(matched, adaptable)
    skipped = [(n, why) for n, _, why in matched if why]
    if target_modules == "all-linear":
        skipped += _heads_and_routers(model, modules, fitting)
    left_out = {n for n, _ in skipped}
    names = tuple(n for n in fitting if n not in left_out)
    if not names:
        raise ValueError(no_match(model, target_modules, modules, skipped, unfit, adaptable))
    skipped += [(n, _why_unfit(model.get_submodule(n))) for n in unfit if _leafy(model, n)]
    return Selection(names, tuple(skipped), tied)


def _exclusion(model: nn.Module, rule: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Return the rule of what is left out: names, or a part of a vision-language model."""
    parts = chosen_parts(model, rule)
    if parts is None:
        return name_rule(rule)
    names = {name for name, _ in parts}
    return lambda name: name in names


def _matched(
    model: nn.Module,
    modules: Sequence[tuple[str, nn.Module]],
    matches: Callable[[str, nn.Module], bool],
    exclude_modules: str | Sequence[str] | None,
    blocks: Callable[[str], bool],
) -> list[tuple[str, nn.Module, str]]:
    """Return (name, module, why it is left out) of the modules that match; "" if it is not."""
    excluded = _exclusion(model, exclude_modules)
    unread = bypassed(modules)
    found = []
    for name, module in modules:
        if name and matches(name, module):
            if any(map(excluded, with_parents(name))):
                found.append((name, module, "excluded"))
            elif blocks(name):
                found.append((name, module, unread.get(name, "")))
    return found


def _fitting(
    matched: Sequence[tuple[str, nn.Module, str]], adaptable: Callable[[nn.Module], bool]
) -> tuple[list[str], list[str]]:
    """Return the matched names that can be adapted, and those that cannot.

    Raises:
        ValueError: experts in a form that cannot be adapted.
    """
    fitting: list[str] = []
    unfit: list[str] = []
    for name, module, why in matched:
        if why:
            continue
        if adaptable(module):
            fitting.append(name)
            continue
        refusal = experts_refusal(module)
        if refusal:
            raise ValueError(
                f"target_modules: {name!r}: expected layers that can be adapted, got {refusal}"
            )
        unfit.append(name)
    return fitting, unfit


def _heads_and_routers(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], names: Sequence[str]
) -> list[tuple[str, str]]:
    """Return (name, reason) of the layers that ``"all-linear"`` leaves out."""
    heads = head_names(model)
    found = [(n, "output head") for n in names if n in heads]
    found += [(n, "router") for n, m in modules if _has_own(m) and _is_router(n, modules)]
    return found


# ---- rules


def _matcher(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    kind_hint: str,
    modules: Sequence[tuple[str, nn.Module]],
    adaptable: Callable[[nn.Module], bool],
) -> Callable[[str, nn.Module], bool]:
    if target_modules == "all-linear":
        return lambda name, module: _is_linear(module)
    parts = chosen_parts(model, target_modules)
    if target_modules is not None and parts is None:
        rule = name_rule(target_modules)
        return lambda name, module: rule(name)
    choices = default_targets(model, kind_hint) if parts is None else _of_parts(parts, kind_hint)
    if not choices:
        found = Counter(n.rpartition(".")[2] for n, m in modules if n and adaptable(m))
        raise ValueError(
            "target_modules: expected a Hugging Face architecture of the table to choose layers "
            f"by, got {_model_types(model) or type(model).__name__}; use "
            'target_modules="all-linear", or name them: layers found are '
            + (", ".join(f"{n} ×{c}" for n, c in found.most_common(30)) or "none")
        )
    return lambda name, module: any(
        (not prefix or name.startswith(prefix + ".")) and matches_suffix(name, suffixes)
        for prefix, suffixes in choices
    )


def _is_linear(module: nn.Module) -> bool:
    """True if ``"all-linear"`` names the module; some of these cannot be adapted."""
    ops = ops_for(module)
    if ops is not None and ops.is_linear:
        return True
    return is_conv1d(module) or bool(experts_refusal(module)) or _is_called_linear(module)


def _is_called_linear(module: nn.Module) -> bool:
    """True for a linear layer of another library, by its class's name."""
    return type(module).__name__.endswith("Linear") and _has_own(module) and ops_for(module) is None


def _has_own(module: nn.Module) -> bool:
    """True if the module has parameters of its own, including frozen packed weights."""
    return any(p is not None for p in module._parameters.values())


def _is_router(name: str, modules: Sequence[tuple[str, nn.Module]]) -> bool:
    """True for a router or a layer inside one.

    A router has experts as a sibling; a plain MLP may have a layer called gate too.
    """
    parent, _, leaf = name.rpartition(".")
    if matches_suffix(name, _ROUTERS):
        if leaf in ("shared_expert_gate", "router"):
            return True
        if any(n == join(parent, "experts") for n, _ in modules):
            return True
    return bool(parent) and _is_router(parent, modules)


def bypassed(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
    """Map modules whose weight another module's forward reads to the reason, by structure."""
    found: dict[str, str] = {}
    for name, module in modules:
        if isinstance(module, nn.MultiheadAttention):
            found[join(name, "out_proj")] = "read by nn.MultiheadAttention: target that module"
        children = dict(module.named_children())
        if "dt_proj" in children and ("x_proj" in children or "A_log" in module._parameters):
            found[join(name, "dt_proj")] = "its weight is read by the mixer's scan"
        if "conv1d" in children and ("in_proj" in children or "A_log" in module._parameters):
            found[join(name, "conv1d")] = "its weight is read by the mixer's scan"
            if "out_proj" in children:  # on some machines only: an adapter would not move
                found[join(name, "out_proj")] = "its weight is read by the fused scan kernel"
        if type(module).__name__ == "EsmContactPredictionHead":
            found[join(name, "regression")] = "never called"
        if type(module).__name__ == "Llama4Router":
            found[name] = "router: returns a tuple"
    return found


def _why_unfit(module: nn.Module) -> str:
    reason = uneditable(module) if ops_for(module) is not None else ""
    return reason or (
        f"{type(module).__module__}.{type(module).__name__} is no known kind of layer; "
        "register_layer adds one"
    )


def _leafy(model: nn.Module, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).named_parameters(recurse=False))


# ---- the table of architectures


def _model_types(model: nn.Module) -> list[str]:
    return [m.config.model_type for _, m in hf_models(model)]


def _families(model: nn.Module) -> list[tuple[str, Family]]:
    found = []
    for name, module in hf_models(model):
        family = MODEL_TYPES.get(module.config.model_type)
        if family is not None:
            found.append((name, family))
    return found


def default_targets(model: nn.Module, kind: str = "lora") -> list[tuple[str, tuple[str, ...]]]:
    """Return (prefix of the Hugging Face model, suffixes) of the usual choice.

    The list is empty if the table has none of the architectures.
    """
    if kind not in ("lora", "ia3"):
        raise ValueError(f"default_targets: expected 'lora' or 'ia3', got {kind!r}")
    return [(n, f.lora if kind == "lora" else f.ia3) for n, f in _families(model)]


def _of_parts(parts: Sequence[Part], kind: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (path of a part, suffixes of its usual choice)."""
    found = []
    for name, model_type in parts:
        family = MODEL_TYPES.get(model_type)
        if family is None:
            raise ValueError(
                f"target_modules: expected a part of an architecture of the table, got {name!r} of "
                f"type {model_type!r}; name its layers"
            )
        found.append((name, family.lora if kind == "lora" else family.ia3))
    return found


def feedforward_targets(model: nn.Module) -> tuple[str, ...]:
    """Return the suffixes of the layers that IA3 scales on the input side, in both parts."""
    families = [family for _, family in _families(model)]
    for part in parts_of(model).values():
        families += [MODEL_TYPES[kind] for _, kind in part if kind in MODEL_TYPES]
    return tuple(dict.fromkeys(s for f in families for s in f.feedforward))
