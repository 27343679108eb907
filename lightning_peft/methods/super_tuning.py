"""Super-Tuning: the largest entries of a weight, and a low-rank change beside (Supra).
arXiv:2607.09287.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.sparse import Sparse
from lightning_peft.core.terms import LowRank, Term
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import (
    empty_like_site,
    kaiming,
    require,
    require_matrix,
    require_places,
)
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.registry import register

__all__ = ["SuperTuning"]


def _unpack(
    method: SuperTuning, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors unchanged, after a check that places lie in the weight."""
    if "places" in p:
        require_places(p["places"].long().reshape(-1), site.shape.numel())
    return dict(p)


@register
@dataclass(frozen=True)
class SuperTuning(WeightMethod):
    """ΔW[places] = values at the entries of largest (or smallest) |W|; + (alpha / r) B A.

    A file of peft that leaves the places out is refused: on a base of another dtype others would be
    chosen.

    Attributes:
        sparsity: Share of entries that stay as they are.
        select_top: Whether the largest are trained, not the smallest.
        r: Rank of the low-rank change beside; None for none.
        alpha: Its scale numerator; goes with `r`.

    Raises:
        ValueError: sparsity outside [0, 1), one of r and alpha without the other, either below 1.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    alpha: float | None = None

    hf = HFFormat(
        peft_type="SUPERTUNING",
        tensors={
            "values": "supertuning_values",
            "places": "supertuning_indices",
            "A": "supertuning_lora_A.weight",
            "B": "supertuning_lora_B.weight",
        },
        integers=("places",),
        config=config_keys("sparsity", "select_top", "r", alpha="lora_alpha"),
        own_defaults=True,
        inert={"lora_dropout": 0.0, "init_weights": True, "save_precomputed_indices": True},
        unpack=_unpack,
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(
            0.0 <= self.sparsity < 1.0,
            f"{self.label}: expected 0 <= sparsity < 1, got {self.sparsity}",
        )
        require(
            (self.r is None) == (self.alpha is None),
            f"{self.label}: expected both of r and alpha or none, got r = {self.r}, alpha = "
            f"{self.alpha}",
        )
        require(
            self.r is None or (self.r >= 1 and (self.alpha or 0) > 0),
            f"{self.label}: expected r >= 1 and alpha > 0, got r = {self.r}, alpha = {self.alpha}",
        )

    def _count(self, site: Site) -> int:
        return int(site.shape.numel() * (1 - self.sparsity))

    def check(self, site: Site) -> None:
        """At least one entry is trained."""
        require_matrix(self.label, site)
        require(
            self._count(site) >= 1,
            f"{self.label} on {site.quoted}: expected a sparsity that leaves an entry of "
            f"{site.shape.numel()}, got {self.sparsity}; lower it or exclude the layer",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """values [K] zeros; A random, B zeros."""
        p = {"values": empty_like_site(site, self._count(site)).zero_()}
        if self.r is not None:
            p["A"] = kaiming(empty_like_site(site, self.r, site.in_features))
            p["B"] = empty_like_site(site, site.out_features, self.r).zero_()
        return p

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """places int32 [K], flat, chosen from the weight."""
        return {"places": empty_like_site(site, self._count(site)).zero_().int()}

    @property
    def starts_from_weight(self) -> bool:
        """Places are chosen by the weight."""
        return True

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """Places of the entries of largest magnitude."""
        top = torch.topk(W.abs().flatten(), self._count(site), largest=self.select_top)
        p["places"] = top.indices.int()
        return None

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A sparse change, and a low-rank one."""
        shape = (site.out_features, site.in_features)
        terms: tuple[Term, ...] = (Sparse(p["values"], p["places"].long(), shape),)
        if self.r is not None and self.alpha is not None:
            terms += (LowRank(p["A"], p["B"], self.alpha / self.r),)
        return Edit(terms=terms)
