"""Which layers an adapter goes to: all-linear, suffixes, a regular expression, or the
architecture's usual choice.

Works on names, on a predicate for what can be adapted, and on the `config.model_type` of Hugging
Face models found anywhere inside the root. A layer whose weight is read by somebody else's forward
is never chosen: an adapter there would have no effect.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.core.names import nearest_names
from lightning_peft.layers.experts.ops import experts_refusal, is_experts
from lightning_peft.models.target_table import MODEL_TYPES, Family

__all__ = [
    "Selection",
    "block_rule",
    "bypassed",
    "classification_heads",
    "default_targets",
    "feedforward_targets",
    "hf_models",
    "name_rule",
    "output_head",
    "select",
    "tied_parameters",
]

#: Attributes that hold an output layer for which `get_output_embeddings` may answer None.
_HEADS = frozenset(
    [
        "lm_head",
        "embed_out",
        "proj_out",
        "classifier",
        "score",
        "qa_outputs",
        "cls",
        "predictions",
        "generator_lm_head",
        "classification_head",
        "pre_classifier",
    ]
)
#: Heads that `from_pretrained` leaves fresh: a fine-tuning that does not train them learns nothing.
_FRESH_HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier")
_FRESH_TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForImageClassification",
    "ForAudioClassification",
    "ForMultipleChoice",
    "ForAudioFrameClassification",
    "ForSemanticSegmentation",
)
#: Routers by the end of their name: choosing experts is not what an adapter should change unasked.
_ROUTERS = ("router", "gate", "shared_expert_gate", "router.classifier", "router.layer")


@dataclass(frozen=True)
class Selection:
    """What was chosen.

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
    adaptable: Callable[[nn.Module], bool],
    kind_hint: str = "lora",
) -> Selection:
    """Choose modules.

    Args:
        model: The root; names are relative to it.
        target_modules: ``"all-linear"``; a list of names or suffixes (at a dot); a regular
            expression that matches a
            whole name; None for the architecture's usual choice. The root itself, where it can be
            adapted and None is given, is the choice.
        exclude_modules: A list or a regular expression, as above.
        layers_to_transform: Indices of the repeated blocks.
        adaptable: Whether a module's weights can be edited.
        kind_hint: ``"lora"`` or ``"ia3"``: the column of the architectures' table.

    Raises:
        ValueError: nothing matches, with the nearest names; or an architecture that the table does
            not have.
    """
    modules = [(n, m) for n, m in model.named_modules() if not _inside_adapter(n)]
    if target_modules is None and adaptable(model):
        return Selection(("",), (), tied_parameters(model))
    matches = _matcher(model, target_modules, kind_hint, modules, adaptable)
    excluded = name_rule(exclude_modules)
    blocks = block_rule(modules, layers_to_transform)
    unread = bypassed(modules)
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    unfit: list[str] = []
    for name, module in modules:
        if not name or not matches(name, module):
            continue
        if excluded(name):
            skipped.append((name, "excluded"))
        elif not blocks(name):
            continue
        elif name in unread:
            skipped.append((name, unread[name]))
        elif not adaptable(module):
            refusal = experts_refusal(module)
            if refusal:
                raise ValueError(
                    f"target_modules: {name!r}: expected layers that can be adapted, got {refusal}"
                )
            unfit.append(name)
        else:
            names.append(name)
    if target_modules == "all-linear":
        heads = output_head(model)
        skipped += [(n, "output head") for n in names if n in heads]
        skipped += [(n, "router") for n, m in modules if _has_own(m) and _is_router(n, modules)]
        left_out = {n for n, _ in skipped}
        names = [n for n in names if n not in left_out]
    if not names:
        raise ValueError(_nothing(model, target_modules, modules, skipped, unfit, adaptable))
    skipped += [(n, "its weights cannot be edited") for n in unfit if _leafy(model, n)]
    return Selection(tuple(names), tuple(skipped), tied_parameters(model))


# ---- rules


def _matcher(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    kind_hint: str,
    modules: Sequence[tuple[str, nn.Module]],
    adaptable: Callable[[nn.Module], bool],
) -> Callable[[str, nn.Module], bool]:
    if target_modules == "all-linear":
        return lambda name, module: _linear_like(module)
    if target_modules is not None:
        rule = name_rule(target_modules)
        return lambda name, module: rule(name)
    choices = default_targets(model, kind_hint)
    if not choices:
        found = Counter(n.rpartition(".")[2] for n, m in modules if n and adaptable(m))
        raise ValueError(
            "target_modules: expected a Hugging Face architecture of the table to choose layers "
            f"by, got {_model_types(model) or type(model).__name__}; name them: layers found are "
            + (", ".join(f"{n} ×{c}" for n, c in found.most_common(30)) or "none")
        )
    return lambda name, module: any(
        (not prefix or name.startswith(prefix + ".")) and _suffix(name, suffixes)
        for prefix, suffixes in choices
    )


def name_rule(rule: str | Sequence[str] | None) -> Callable[[str], bool]:
    """A list is suffixes at a dot; a string is a regular expression, unless it is a bare name."""
    if rule is None:
        return lambda name: False
    if isinstance(rule, str):
        if re.fullmatch(r"[\w-]+", rule):
            return lambda name: _suffix(name, (rule,))
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise ValueError(
                "target_modules, exclude_modules: expected a layer's name, a list of suffixes or a "
                f"regular expression, got {rule!r} ({error})"
            ) from None
        return lambda name: pattern.fullmatch(name) is not None
    suffixes = tuple(rule)
    return lambda name: _suffix(name, suffixes)


def _suffix(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == s or name.endswith("." + s) for s in suffixes)


def block_rule(
    modules: Sequence[tuple[str, nn.Module]], layers: int | Sequence[int] | None
) -> Callable[[str], bool]:
    """Whether a name lies in one of the repeated blocks of these indices; all for None."""
    if layers is None:
        return lambda name: True
    wanted = {layers} if isinstance(layers, int) else set(layers)
    lists = [n for n, m in modules if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise ValueError(
            f"layers_to_transform: expected a model with repeated blocks, got {sorted(wanted)} for "
            "a model without an nn.ModuleList; leave it out and name layers in target_modules"
        )
    longest = max(len(m) for _, m in modules if isinstance(m, nn.ModuleList))
    beyond = sorted(i for i in wanted if not -1 < i < longest)
    if beyond:
        raise ValueError(
            f"layers_to_transform: expected indices below {longest}, got {beyond}; count from 0"
        )
    outer = [n for n in lists if not any(n.startswith(o + ".") for o in lists if o != n)]
    patterns = [re.compile(rf"{re.escape(n)}\.(\d+)(\.|$)") for n in outer]

    def inside(name: str) -> bool:
        hits = [p.match(name) for p in patterns]
        return any(h is not None and int(h.group(1)) in wanted for h in hits)

    return inside


def _linear_like(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    if any(c.__name__ == "Conv1D" for c in type(module).__mro__):
        return True
    return is_experts(module) or bool(experts_refusal(module))


def _has_own(module: nn.Module) -> bool:
    """Whether it holds parameters of its own, frozen base weights of a packed layer included."""
    return any(p is not None for p in module._parameters.values())


def _is_router(name: str, modules: Sequence[tuple[str, nn.Module]]) -> bool:
    """A router, or a layer inside one, has experts for a sibling (a plain MLP may well have a
    layer called gate).
    """
    parent, _, leaf = name.rpartition(".")
    if any(name.endswith("." + r) or leaf == r for r in _ROUTERS):
        if leaf in ("shared_expert_gate", "router"):
            return True
        prefix = f"{parent}." if parent else ""
        if any(n == f"{prefix}experts" for n, _ in modules):
            return True
    return bool(parent) and _is_router(parent, modules)


def bypassed(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
    """Modules whose weight another module's forward reads, by structure."""
    found: dict[str, str] = {}
    for name, module in modules:
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found[f"{prefix}out_proj"] = "read by nn.MultiheadAttention: target that module"
        children = dict(module.named_children())
        if "dt_proj" in children and ("x_proj" in children or "A_log" in module._parameters):
            found[f"{prefix}dt_proj"] = "its weight is read by the mixer's scan"
        if "conv1d" in children and ("in_proj" in children or "A_log" in module._parameters):
            found[f"{prefix}conv1d"] = "its weight is read by the mixer's scan"
            if "out_proj" in children:  # on some machines only: an adapter would not move
                found[f"{prefix}out_proj"] = "its weight is read by the fused scan kernel"
        if type(module).__name__ == "EsmContactPredictionHead":
            found[f"{prefix}regression"] = "never called"
        if type(module).__name__ == "Llama4Router":
            found[name] = "router: returns a tuple"
    return found


def _inside_adapter(name: str) -> bool:
    parts = name.split(".")
    return "peft" in parts


def _leafy(model: nn.Module, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).named_parameters(recurse=False))


# ---- what a model says about itself


def hf_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Outermost sub-modules with a transformers config, by duck typing."""
    taken: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(t + ".") or t == "" for t in taken):
            continue
        if isinstance(getattr(getattr(module, "config", None), "model_type", None), str):
            taken.append(name)
            yield name, module


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
    """(prefix of the Hugging Face model, suffixes) of the usual choice; empty where the table has
    none of them.
    """
    if kind not in ("lora", "ia3"):
        raise ValueError(f"default_targets: expected 'lora' or 'ia3', got {kind!r}")
    return [(n, f.lora if kind == "lora" else f.ia3) for n, f in _families(model)]


def feedforward_targets(model: nn.Module) -> tuple[str, ...]:
    """Suffixes of the layers that IA3 scales on the input side."""
    return tuple(dict.fromkeys(s for _, f in _families(model) for s in f.feedforward))


def output_head(model: nn.Module) -> set[str]:
    """Names of the output layers: what `get_output_embeddings` answers, and heads known by name."""
    heads: set[str] = set()
    by_id = {id(m): n for n, m in model.named_modules()}
    for name, module in hf_models(model):
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module) and id(head) in by_id:
            heads.add(by_id[id(head)])
        prefix = f"{name}." if name else ""
        for child, part in module.named_children():
            if child in _HEADS:
                heads |= {
                    f"{prefix}{child}.{n}" if n else f"{prefix}{child}"
                    for n, _ in part.named_modules()
                }
    return heads


def classification_heads(model: nn.Module) -> list[str]:
    """Names of heads that are fresh in a model for a task, to be trained whole."""
    found = []
    for name, module in hf_models(model):
        if any(type(module).__name__.endswith(t) for t in _FRESH_TASKS):
            prefix = f"{name}." if name else ""
            found += [f"{prefix}{c}" for c, _ in module.named_children() if c in _FRESH_HEADS]
    return found


def tied_parameters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names of one tensor in different modules (a module under two names is no tie)."""
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{module_name}.{leaf}" if module_name else leaf
                names.setdefault(id(parameter), []).append(full)
    return tuple(tuple(n) for n in names.values() if len(n) > 1)


# ---- errors


def _nothing(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    modules: Sequence[tuple[str, nn.Module]],
    skipped: Sequence[tuple[str, str]],
    unfit: Sequence[str],
    adaptable: Callable[[nn.Module], bool],
) -> str:
    text = (
        f"target_modules: expected to match a layer of {type(model).__name__}, got "
        f"{target_modules!r}, which matches none"
    )
    if unfit:
        kinds = sorted({type(model.get_submodule(n)).__name__ for n in unfit})
        text += (
            f" that can be adapted (it matches {', '.join(unfit[:3])} of type {', '.join(kinds)})"
        )
    if skipped:
        text += "; left out: " + ", ".join(f"{n} ({why})" for n, why in skipped[:5])
    names = [n for n, m in modules if n and adaptable(m)]
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    near = [x for w in wanted for x in nearest_names(w.rpartition(".")[2] or w, names)]
    return (
        f"{text}; nearest names: "
        f"{', '.join(list(dict.fromkeys(near))[:8]) or 'no layer of this model can be adapted'}"
    )
