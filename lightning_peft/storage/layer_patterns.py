"""Layers as the configurations of compressed-tensors and Model Optimizer name them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from lightning_peft.storage.released_format import ReleasedWeight

__all__ = ["is_listed", "matches_pattern"]


def is_listed(weight: ReleasedWeight, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns means the linear layer that holds the weight in the files.

    A stack of experts is many linear layers there; those of the first expert stand for all.
    """
    name = weight.layer
    if weight.experts:
        leaf = "down_proj" if weight.name == "down_proj" else "gate_proj"
        name = f"{name}.0.{leaf}"
    return any(matches_pattern(name, pattern) for pattern in patterns)


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether an entry of ``ignore`` or ``targets`` means this layer."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatch(name, pattern)
