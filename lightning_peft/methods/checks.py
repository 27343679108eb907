"""Checks and small helpers that method files share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_peft.core.name_patterns import ends_with_pattern
from lightning_peft.core.names import strip_compile
from lightning_peft.core.site import Site

__all__ = [
    "empty_like_site",
    "empty_shared",
    "kaiming",
    "match_pattern",
    "match_site",
    "require",
    "require_bias",
    "require_choice",
    "require_dropout",
    "require_features",
    "require_linear",
    "require_matrix",
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


def require_bias(label: str, bias: str, only: str) -> None:
    """Raise ValueError unless `bias` is none, all, or the word for those of adapted layers."""
    require(
        bias in ("none", "all", only),
        f"{label}: expected bias in ('none', 'all', {only!r}), got {bias!r}",
    )


def require_dropout(label: str, p: float) -> None:
    """Raise ValueError where a probability of dropping is outside [0, 1)."""
    require(0.0 <= p < 1.0, f"{label}: expected 0 <= dropout < 1, got dropout = {p}")


def require_features(label: str, site: Site) -> None:
    """Raise ValueError on an embedding."""
    require(
        not site.is_embedding,
        f"{label} on {site.quoted}: expected a layer with features for input, got an embedding; "
        "exclude it",
    )


def require_matrix(label: str, site: Site) -> None:
    """Raise ValueError on a stack of experts."""
    require(
        not site.batch_shape,
        f"{label} on {site.quoted}: expected one matrix, got a stack of experts; exclude it or "
        "use LoRA there",
    )


def require_linear(label: str, site: Site) -> None:
    """Raise ValueError on a layer whose input does not end in features."""
    require(
        site.ops.features_last and not site.is_embedding,
        f"{label} on {site.quoted}: expected a linear layer, got {type(site.module).__name__}; "
        "exclude it or use LoRA there",
    )


def require_choice(label: str, name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError where the value of a field is none of `choices`."""
    known = tuple(choices)
    require(value in known, f"{label}: expected {name} in {known}, got {value!r}")


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


def kaiming(t: Tensor) -> Tensor:
    """Kaiming-uniform with a = √5 over rows of length in, in place: U(−1/√in, 1/√in)."""
    bound = 1 / math.sqrt(t.shape[-1])
    return torch.nn.init.uniform_(t, -bound, bound)


def empty_shared(sites: Sequence[Site], *shape: int) -> Tensor:
    """An fp32 tensor that sites share, on meta where their weights are, else on the CPU."""
    device = "meta" if sites[0].device.type == "meta" else "cpu"
    return torch.empty(shape, dtype=torch.float32, device=device)


def empty_like_site(site: Site, *shape: int) -> Tensor:
    """An fp32 tensor [*batch, *shape], on meta where the site's weight is, else on the CPU.

    Adapters start on the CPU (their values then depend on the seed alone, not on the device) and
    are moved by attach.
    """
    device = "meta" if site.device.type == "meta" else "cpu"
    return torch.empty(*site.batch_shape, *shape, dtype=torch.float32, device=device)
