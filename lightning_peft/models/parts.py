"""The language part and the vision part of a vision-language model of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.core.modules import modules_by_name
from lightning_peft.core.names import join
from lightning_peft.models.modules import hf_models

__all__ = ["PART_RULES", "Part", "chosen_parts", "parts_of"]

#: Rule for `target_modules` and `exclude_modules` → the parts that it names.
PART_RULES: dict[str, tuple[str, ...]] = {
    "language": ("language",),
    "vision": ("vision",),
    "language+vision": ("language", "vision"),
}

#: (path of the part's module, its model type).
Part = tuple[str, str]


def parts_of(model: nn.Module) -> dict[str, list[Part]]:
    """Return the parts of every vision-language model inside, by "language" and "vision".

    A part is the outermost module with the text or the vision configuration of the whole. What lies
    between the parts (projectors, resamplers) belongs to neither.
    """
    found: dict[str, list[Part]] = {"language": [], "vision": []}
    for prefix, net in hf_models(model):
        vision = getattr(net.config, "vision_config", None)
        if vision is None:
            continue
        for kind, config in (("language", net.config.get_text_config()), ("vision", vision)):
            if config is net.config:
                continue
            name = _outermost(net, config)
            if name:
                found[kind].append((join(prefix, name), str(config.model_type)))
    return found


def _outermost(net: nn.Module, config: Any) -> str:
    """Return the path of the outermost module that holds a configuration; "" if none does."""
    for name, module in modules_by_name(net).items():
        if name and getattr(module, "config", None) is config:
            return name
    return ""


def chosen_parts(model: nn.Module, rule: object) -> list[Part] | None:
    """Return the parts that a rule names; None if it is another rule, or the model has no parts.

    Raises:
        ValueError: the model has parts, but not the one that is named.
    """
    if not isinstance(rule, str) or rule not in PART_RULES:
        return None
    parts = parts_of(model)
    if not any(parts.values()):
        return None
    missing = [kind for kind in PART_RULES[rule] if not parts[kind]]
    if missing:
        raise ValueError(
            f"target_modules={rule!r}: expected a model with a {missing[0]} part, found only "
            f"{[name for part in parts.values() for name, _ in part]}; name layers or modules"
        )
    return [part for kind in PART_RULES[rule] for part in parts[kind]]
