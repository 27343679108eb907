"""Layer names from before transformers 5, which peft 0.21 and transformers 5 both fail on.

transformers renames tensors of old checkpoints while it loads them; the same rules, reversed, say
what the layers of a model were called. A naming counts only where the rules lead back to the name
that the layer has now, so that a round trip cannot lose a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_peft.core.modules import base_modules
from lightning_peft.hf.rename import Renaming, module_path, renamed
from lightning_peft.methods.base import HFFormat
from lightning_peft.models.saving import is_transformers_model

__all__ = ["current_names", "legacy_names", "namings"]


class _Rule(Protocol):
    """A rule by which transformers renames, or splits, the tensors of old checkpoints."""

    source_patterns: list[str]
    target_patterns: list[str]
    scope_prefix: str | None
    base_model_prefix: str
    compiled_sources: re.Pattern[str]

    def rename_source_key(self, key: str) -> tuple[str, str | None]:
        """Return the new key, and the pattern that matched (None for none)."""
        ...

    def reverse_transform(self) -> _Rule:
        """Return the rule that leads back."""
        ...


def _no_rules() -> list[_Rule]:
    return []


def _tower() -> list[_Rule]:
    from transformers.core_model_loading import PrefixChange

    return [PrefixChange(prefix_to_remove="vision_model")]


#: Class → rules that transformers 5.23 has not for it, in its own terms.
_OURS: dict[str, Callable[[], list[_Rule]]] = {"MLCDVisionModel": _tower}

#: Class → the part that rules are meant for which would fit others too.
_SCOPES = {"AltCLIPModel": "text_model"}

#: Models of several parts whose first names changed within release 4, not with release 5.
_REGROUPED = frozenset(
    [
        *("aria", "aya_vision", "colpali", "colqwen2", "emu3", "fuyu", "gemma3", "got_ocr2"),
        *("internvl", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3"),
        *(
            "mllama",
            "paligemma",
            "pp_chart2table",
            "qwen2_5_vl",
            "qwen2_vl",
            "shieldgemma2",
            "video_llava",
        ),
        *("vipllava", "vit_msn"),
    ]
)

#: Name of a layer now → what it was called; several layers of one old name are parts of it.
Naming = dict[str, str]


def current_names(
    top: nn.Module, fmt: HFFormat, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return the adapter in the model's present names, and a note on the renaming.

    The adapter is returned as it is if its names fit already, or if no naming fits: loading is
    strict.

    Raises:
        ValueError: a layer that became several under a method that cannot be split.
    """
    modules = _modules(top)
    paths = {module_path(fmt, key)[1] for key in tensors} - {""}
    if paths <= modules.keys():
        return config, tensors, ""
    for naming in namings(top):
        parts = _parts(naming, modules)
        if paths <= parts.keys():
            names = Renaming(parts, {o: modules[n[0]] for o, n in parts.items()}, list(modules))
            config, tensors = renamed(fmt, config, tensors, names)
            changed = sum(parts[p] != [p] for p in paths)
            return config, tensors, f"names of {changed} layers are from before transformers 5"
    return config, tensors, ""


def legacy_names(
    top: nn.Module, fmt: HFFormat, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter in the names of transformers 4.

    Raises:
        ValueError: the model is not one of transformers', or an adapted layer was part of a larger
            one, or no rule leads back from its old name.
    """
    if not is_transformers_model(top):
        raise ValueError(
            f"save_adapter(names='legacy'): expected a model of transformers, got "
            f"{type(top).__name__}, whose old layer names are not known; write names='current'"
        )
    modules = _modules(top)
    naming = next(namings(top))
    paths = sorted({module_path(fmt, key)[1] for key in tensors} - {""})
    lost = [p for p in paths if p not in naming]
    whole = {o: n for o, n in _parts(naming, modules).items() if len(n) > 1}
    lost += [p for p in paths if naming.get(p) in whole]
    if lost:
        raise ValueError(
            f"save_adapter(names='legacy'): expected layers that were single layers in "
            f"transformers 4, got {lost[:3]}, which were not; exclude them, or write "
            "names='current'"
        )
    to = {n: [o] for n, o in naming.items()}
    names = Renaming(to, {n: modules[n] for n in naming}, sorted(set(naming.values())))
    return renamed(fmt, config, tensors, names)


def namings(top: nn.Module) -> Iterator[Naming]:
    """Yield the namings that the model's layers may have had, the last release 4's first."""
    if not is_transformers_model(top):
        return
    seen: list[Naming] = []
    for transforms in _generations(top):
        naming = _reversed(_modules(top), transforms)
        if naming not in seen:
            seen.append(naming)
            yield naming


def _modules(top: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in base_modules(top).items() if n}


def _parts(naming: Naming, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Map each old name to the layers it became, in order of definition."""
    parts: dict[str, list[str]] = {}
    for name in modules:
        if name in naming:
            parts.setdefault(naming[name], []).append(name)
    return parts


def _generations(top: nn.Module) -> Iterator[list[_Rule]]:
    """Yield lists of transformers' rules, one per possible release, the last 4.x first."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    theirs = get_model_conversion_mapping(top, add_legacy=False)
    rules = [r for r in (*_OURS.get(type(top).__name__, _no_rules)(), *theirs) if _single(r)]
    rules = [r for r in rules if not (isinstance(r, PrefixChange) and _is_tower(top, r))]
    for rule in rules:
        if rule.scope_prefix is None and type(top).__name__ in _SCOPES:
            rule.scope_prefix, rule.base_model_prefix = _SCOPES[type(top).__name__], ""
    # Rules for the first names of all: models of several parts were regrouped within release 4.
    inner = [r for r in rules if isinstance(r, PrefixChange) or not _anchored(r)]
    regrouped = getattr(getattr(top, "config", None), "model_type", None) in _REGROUPED
    yield from (inner, rules) if regrouped else (rules, inner)


def _is_tower(top: nn.Module, rule: _Rule) -> bool:
    """True if a rule that removes a tower's repeated name is meant for the tower alone.

    The name was repeated (vision_model.vision_model) only in models with a language model too.
    """
    parent, _, name = (rule.scope_prefix or "").rpartition(".")
    if not name or name != getattr(rule, "prefix_to_remove", None):
        return False
    base = getattr(top, "base_model_prefix", "")
    for path in (f"{base}.{parent}".strip("."), parent):
        try:
            children = dict(top.get_submodule(path).named_children())
        except AttributeError:
            continue
        return "language_model" not in children
    return True


def _anchored(rule: _Rule) -> bool:
    return any(p.startswith("^") for p in rule.source_patterns)


def _single(rule: _Rule) -> bool:
    """True if a rule renames, or splits a weight evenly along its output."""
    operations = getattr(rule, "operations", None)
    if operations is None:
        return True
    return [type(o).__name__ for o in operations] == ["Chunk"] and operations[0].dim == 0


def _reversed(modules: Mapping[str, nn.Module], rules: Sequence[_Rule]) -> Naming:
    """Map each layer to its old name, if the rules lead from that name back to the layer."""
    renames = [r for r in rules if not hasattr(r, "operations")]
    splits = [r for r in rules if hasattr(r, "operations")]
    back = [r.reverse_transform() for r in reversed(splits)]
    back += [r.reverse_transform() for r in reversed(renames)]
    naming: Naming = {}
    for name in modules:
        old = _through(back, [f"{name}.weight"])[0]
        if f"{name}.weight" in _through([*renames, *splits], [old]):
            naming[name] = old.removesuffix(".weight")
    return naming


def _through(rules: Sequence[_Rule], keys: list[str]) -> list[str]:
    """Apply all rules to the keys; a rule that splits a weight yields a key per part."""
    for rule in rules:
        renamed_keys = []
        for key in keys:
            first, pattern = rule.rename_source_key(key)
            if pattern is None or _inside_a_name(rule, key):
                renamed_keys.append(key)
            else:
                head, *_ = targets = rule.target_patterns
                renamed_keys += [first, *(first.replace(head, t, 1) for t in targets[1:])]
        keys = renamed_keys
    return keys


def _inside_a_name(rule: _Rule, key: str) -> bool:
    """True if a rule matched inside a longer word (layers in decoder_layers)."""
    found = rule.compiled_sources.search(key)
    return found is not None and found.start() > 0 and "." not in key[found.start() - 1 :][:2]
