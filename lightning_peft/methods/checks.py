"""Checks and small helpers that method files share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lightning_peft.core.name_patterns import ends_with_pattern
from lightning_peft.core.names import strip_compile
from lightning_peft.core.site import Site

__all__ = [
    "match_pattern",
    "match_site",
    "require",
    "require_either",
    "require_no_network",
    "require_ordered",
    "require_places",
    "require_ranks",
]

V = TypeVar("V")


def match_pattern(patterns: Mapping[str, V], name: str, default: V) -> V:
    """Return the value of the first pattern that matches a layer's name.

    As in peft, a pattern matches if ``(.*\\.)?PATTERN$`` does.
    """
    for pattern, value in patterns.items():
        if ends_with_pattern(pattern, strip_compile(name)):
            return value
    return default


def match_site(patterns: Mapping[str, V], site: Site, default: V) -> V:
    """Value of the first pattern that matches a weight by its layer's name, or by its own."""
    for pattern, value in patterns.items():
        if match_pattern({pattern: True}, site.name, False) or match_pattern(
            {pattern: True}, f"{site.name}.{site.parameter}", False
        ):
            return value
    return default


def require_ranks(
    label: str,
    r: int,
    rank_pattern: Mapping[str, int],
    alpha: float,
    alpha_pattern: Mapping[str, float],
) -> None:
    """Raise ValueError where a rank is below 1 or an alpha not above 0, patterns included."""
    for where, rank in {"r": r, **rank_pattern}.items():
        require(rank >= 1, f"{label}: expected a rank >= 1, got {where} = {rank}")
    for where, scale in {"alpha": alpha, **alpha_pattern}.items():
        require(scale > 0, f"{label}: expected alpha > 0, got {where} = {scale}")


def require_ordered(method: Any, name: str) -> None:
    """Raise ValueError where token ids are in a collection without an order."""
    ids = getattr(method, name)
    require(
        isinstance(ids, Sequence),
        f"{method.label}: expected {name} in the order of the text, got {ids!r}; give a list",
    )


def require_no_network(method: Any, option: str, off: object) -> None:
    """Raise ValueError where a network makes the prompt: a table without it cannot be loaded."""
    got = getattr(method, option)
    require(
        got == off,
        f"{method.label}: expected {option}={off} for a table without its network, got {got!r}",
    )


def require_either(method: Any, first: str, second: str) -> None:
    """Raise ValueError unless exactly one of two numbers of a method is above 0, the other 0."""
    a, b = getattr(method, first), getattr(method, second)
    require(
        a >= 0 and b >= 0 and (a > 0) != (b > 0),
        f"{method.label}: expected exactly one of {first} and {second} above 0, got {first} = {a}, "
        f"{second} = {b}",
    )


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_shape(name: str, t: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError where a tensor of a file has another shape than `shape`."""
    require(
        tuple(t.shape) == tuple(shape),
        f"expected {name} of shape {list(shape)}, got {list(t.shape)}",
    )


def require_places(places: Tensor, size: int) -> None:
    """Raise ValueError where flat places in a weight of `size` elements leave it or repeat."""
    low, high = int(places.min()), int(places.max())
    require(
        low >= 0 and high < size,
        f"expected places from 0 to {size - 1}, got {low} to {high}",
    )
    distinct = len(places.unique())
    require(
        distinct == len(places),
        f"expected places that differ, got {len(places)} of which {distinct} differ",
    )
