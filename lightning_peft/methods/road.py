"""RoAd: pairs of outputs rotated and scaled, y' = M y. Liao & Monz 2024, arXiv:2409.00119."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit, OutMap
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix, require_divisor
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["PairRotations", "RoAd"]

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@dataclass(frozen=True)
class PairRotations(OutMap):
    """c ∘ y + d ∘ turned(y); in a group [y₁, y₂] of halves, turned is [−y₂, y₁].

    Attributes:
        c, d: [out].
        group_size: Outputs of a group.
    """

    c: Tensor
    d: Tensor
    group_size: int

    def apply(self, y: Tensor) -> Tensor:
        """Two passes over y."""
        first, second = y.unflatten(-1, (-1, 2, self.group_size // 2)).unbind(-2)
        turned = torch.stack((-second, first), dim=-2).flatten(-3)
        return self.c.to(y.dtype) * y + self.d.to(y.dtype) * turned


@register
@dataclass(frozen=True)
class RoAd(WeightMethod):
    """Pairs (y_j, y_{j + g/2}) of a group of g outputs, bias included, turned by θ, scaled by α.

    Attributes:
        variant: ``"road_1"``: one θ and α per pair; ``"road_2"``: one of each per output;
            ``"road_4"``: two.
        group_size: Outputs of a group; even, divides out_features.

    Raises:
        ValueError: an unknown variant, group_size not even or below 2.
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    site_rules = (one_matrix,)
    hf = HFFormat(
        peft_type="ROAD",
        tensors={"theta": "road_theta", "alpha": "road_alpha"},
        config=config_keys("variant", "group_size"),
        own_defaults=True,
        inert={"init_weights": True},
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            self.group_size >= 2 and self.group_size % 2 == 0,
            f"{self.label}: expected an even group_size >= 2, got {self.group_size}",
        )

    def check(self, site: Site) -> None:
        """Groups tile the outputs."""
        super().check(site)
        require_divisor(self, site, "group_size", self.group_size, ("out",))

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """theta zeros, alpha ones: M = I."""
        n = int(site.out_features * _SIZES[self.variant])
        return {
            "theta": empty_like_site(site, n).zero_(),
            "alpha": empty_like_site(site, n).fill_(1.0),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """An output map: c = α cos θ, d = α sin θ."""
        theta, alpha = p["theta"], p["alpha"]
        g = self.group_size
        if self.variant == "road_1":
            theta, alpha = (
                t.view(-1, 1, g // 2).expand(-1, 2, -1).reshape(-1) for t in (theta, alpha)
            )
        if self.variant == "road_4":
            theta, alpha = (t.view(-1, 2, g) for t in (theta, alpha))
            c = (alpha[:, 0] * theta[:, 0].cos()).flatten()
            d = (alpha[:, 1] * theta[:, 1].sin()).flatten()
        else:
            c, d = alpha * theta.cos(), alpha * theta.sin()
        return Edit(out_map=PairRotations(c, d, g))
