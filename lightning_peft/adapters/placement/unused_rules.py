"""Rules of a method that match no layer: a misspelt name changes nothing, and says so."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_peft.adapters.placement.placement import PlannedAdapter
from lightning_peft.core.modules import base_modules, base_parameters
from lightning_peft.core.name_patterns import check_pattern
from lightning_peft.core.names import matches_suffix, nearest_names
from lightning_peft.methods.base import Method
from lightning_peft.methods.checks import match_site
from lightning_peft.models.parts import chosen_parts
from lightning_peft.models.target_rules import name_rule

__all__ = ["check_patterns", "unused_rules"]


def check_patterns(method: Method) -> None:
    """Raise if a key of `rank_pattern`, `alpha_pattern` or the like is no regular expression.

    Raises:
        ValueError: with the field, the key and what is wrong with it.
    """
    for field, patterns in _pattern_fields(method).items():
        for key in patterns:
            try:
                check_pattern(key)
            except ValueError as error:
                why = str(error).removeprefix("pattern: ")
                raise ValueError(f"{method.label} {field}: {why}") from None


def unused_rules(
    model: nn.Module, methods: Sequence[Method], planned: Sequence[PlannedAdapter]
) -> list[str]:
    """Return one line per name or pattern that matches nothing, with the nearest names."""
    modules = [n for n in base_modules(model) if n]
    weights = list(base_parameters(model))
    names = [*modules, *weights]  # an entry may name one weight of a layer that has several
    lines: list[str] = []
    for method in methods:
        sites = [p.placement.site for p in planned if p.method is method]
        for field in ("target_modules", "exclude_modules"):
            given = getattr(method, field, None)
            if chosen_parts(model, given) is not None:
                continue
            for rule in _unmatched(given, names):
                near = _near(rule, modules)
                lines.append(f"{method.label} {field}: {rule!r} matches no module{near}")
        for field, patterns in _pattern_fields(method).items():
            for key in patterns:
                if not any(match_site({key: True}, site, False) for site in sites):
                    adapted = [site.name for site in sites]
                    lines.append(
                        f"{method.label} {field}: {key!r} matches no adapted layer"
                        f"{_near(key, adapted)}"
                    )
    return lines


def _pattern_fields(method: Method) -> dict[str, Mapping[str, object]]:
    if not dataclasses.is_dataclass(method):
        return {}
    fields = [f.name for f in dataclasses.fields(method) if f.name.endswith("_pattern")]
    return {name: getattr(method, name) or {} for name in fields}


def _unmatched(rule: str | Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return the entries of a rule that match no module and no weight of one."""
    if rule is None or rule == "all-linear":
        return []
    if isinstance(rule, str):
        matches = name_rule(rule)
        return [] if any(matches(n) for n in names) else [rule]
    return [entry for entry in rule if not any(matches_suffix(n, [entry]) for n in names)]


def _near(rule: str, names: Sequence[str]) -> str:
    wanted = re.sub(r"[^\w.]", "", rule)
    near = nearest_names(wanted.rpartition(".")[2] or wanted, list(dict.fromkeys(names)), 3)
    leaves = list(dict.fromkeys(n.rpartition(".")[2] for n in near))
    return f"; nearest: {', '.join(leaves)}" if leaves else ""
