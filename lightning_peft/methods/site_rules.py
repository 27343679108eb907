"""Rules for the layers that a method takes; `WeightMethod.site_rules` lists them."""

from __future__ import annotations

from typing import Any

from lightning_peft.core.site import Site
from lightning_peft.methods.checks import match_site, require

__all__ = [
    "features_in",
    "linear_layer",
    "one_matrix",
    "rank_within_layer",
    "require_divisor",
    "require_rank",
]


def features_in(method: Any, site: Site) -> None:
    """Raise ValueError on an embedding."""
    require(
        not site.is_embedding,
        f"{method.label} on {site.quoted}: expected a layer with features for input, got an "
        "embedding; exclude it",
    )


def one_matrix(method: Any, site: Site) -> None:
    """Raise ValueError on a stack of experts."""
    require(
        not site.batch_shape,
        f"{method.label} on {site.quoted}: expected one matrix, got a stack of experts; exclude it "
        "or use LoRA there",
    )


def linear_layer(method: Any, site: Site) -> None:
    """Raise ValueError on a layer other than one matrix whose input ends in features."""
    require(
        site.ops.features_last and not site.is_embedding and not site.batch_shape,
        f"{method.label} on {site.quoted}: expected a linear layer, got "
        f"{type(site.module).__name__}; exclude it or use LoRA there",
    )


def rank_within_layer(method: Any, site: Site) -> None:
    """Raise ValueError where r, or its value in `rank_pattern`, exceeds the layer's size."""
    require_rank(method, site, match_site(getattr(method, "rank_pattern", {}), site, method.r))


def require_rank(method: Any, site: Site, r: int, *, name: str = "r", below: bool = False) -> None:
    """Raise ValueError where a rank exceeds the layer's smaller side, or reaches it (`below`)."""
    most = min(site.out_features, site.in_features)
    require(
        r < most or (r == most and not below),
        f"{method.label} on {site.quoted}: expected {name} {'<' if below else '<='} "
        f"min(in_features, out_features) = {most}, got {name} = {r}; lower {name} or exclude the "
        "layer",
    )


def require_divisor(
    method: Any, site: Site, name: str, n: int, sizes: tuple[str, ...] = ("in", "out")
) -> None:
    """Raise ValueError unless n divides the layer's in_features and out_features.

    Args:
        method: The method.
        site: The weight.
        name: The argument, for the message.
        n: Its value at this site.
        sizes: The sides that it must divide.
    """
    found = {f"{side}_features": getattr(site, f"{side}_features") for side in sizes}
    require(
        all(size % n == 0 for size in found.values()),
        f"{method.label} on {site.quoted}: expected {name} that divides "
        f"{' and '.join(f'{side} = {size}' for side, size in found.items())}, got {name} = {n}; "
        "choose another or exclude the layer",
    )
