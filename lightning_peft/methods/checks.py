"""Checks and small helpers that method files share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.site import Site

__all__ = ["empty_like_site", "match_pattern", "match_site", "require", "require_ranks"]


def match_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Value of the first pattern that matches a layer's name, as peft does it:
    ``(.*\\.)?PATTERN$``.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def match_site(patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
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


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def empty_like_site(site: Site, *shape: int) -> Tensor:
    """An fp32 tensor [*batch, *shape], on meta where the site's weight is, else on the CPU.

    Adapters start on the CPU (their values then depend on the seed alone, not on the device) and
    are moved by attach.
    """
    device = "meta" if site.device.type == "meta" else "cpu"
    return torch.empty(*site.batch_shape, *shape, dtype=torch.float32, device=device)
