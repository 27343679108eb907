"""Rules that choose modules by name: suffixes, regular expressions, indices of repeated blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from lightning_peft.core.name_patterns import check_pattern, ends_with_pattern, fullmatch
from lightning_peft.core.names import matches_suffix, strip_compile

__all__ = ["block_rule", "name_rule"]


def name_rule(rule: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Return the rule for names: suffixes at a dot, a bare name, or a regular expression."""
    if rule is None:
        return lambda name: False
    if isinstance(rule, str):
        if re.fullmatch(r"[\w-]+", rule):
            return lambda name: matches_suffix(name, (rule,))
        try:
            check_pattern(rule)
        except ValueError as error:
            why = str(error).removeprefix("pattern: ")
            raise ValueError(f"target_modules, exclude_modules: {why}") from None
        return lambda name: any(fullmatch(rule, n) for n in {name, strip_compile(name)})
    suffixes = tuple(rule)
    return lambda name: matches_suffix(name, suffixes)


def block_rule(
    modules: Sequence[tuple[str, nn.Module]],
    layers: int | Sequence[int] | None,
    pattern: str | Sequence[str] | None = None,
) -> Callable[[str], bool]:
    """Return the rule that a name is in a repeated block of these indices; None allows all.

    Args:
        modules: All modules by name.
        layers: Indices of the blocks.
        pattern: Names, or ends of names, of the lists that count; None means the outermost lists.

    Raises:
        ValueError: no list of blocks, or an index beyond the longest.
    """
    if layers is None:
        if pattern is not None:
            raise ValueError(
                f"layers_pattern: expected with layers_to_transform, got {pattern!r} alone; give "
                "the numbers of the blocks too"
            )
        return lambda name: True
    wanted = {layers} if isinstance(layers, int) else set(layers)
    lists = [n for n, m in modules if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise ValueError(
            f"layers_to_transform: expected a model with repeated blocks, got {sorted(wanted)} for "
            "a model without an nn.ModuleList; leave it out and name layers in target_modules"
        )
    if pattern is not None:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        named = [n for n in lists if any(ends_with_pattern(p, strip_compile(n)) for p in patterns)]
        if not named:
            raise ValueError(
                f"layers_pattern: expected the name of a list of blocks, got {pattern!r}; "
                f"here are {lists[:10]}"
            )
        lists = named
    longest = max(len(m) for n, m in modules if isinstance(m, nn.ModuleList) and n in lists)
    beyond = sorted(i for i in wanted if not -1 < i < longest)
    if beyond:
        raise ValueError(
            f"layers_to_transform: expected indices below {longest}, got {beyond}; count from 0"
        )
    outer = [
        n
        for n in lists
        if not any(strip_compile(n).startswith(_before_index(o)) for o in lists if o != n)
    ]
    heads = [re.compile(rf"{re.escape(_before_index(n))}(\d+)(\.|$)") for n in outer]

    def inside(name: str) -> bool:
        hits = [p.match(strip_compile(name)) for p in heads]
        return any(h is not None and int(h.group(1)) in wanted for h in hits)

    return inside


def _before_index(name: str) -> str:
    """The name of a list, with the dot before an index; "" for a model that is a list."""
    plain = strip_compile(name)
    return f"{plain}." if plain else ""
