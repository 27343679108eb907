"""Super-Tuning: the largest entries of a weight, and a low-rank change beside (Supra).
arXiv:2607.09287.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.sparse import Sparse
from lightning_peft.core.terms import LowRank, Term
from lightning_peft.methods.base import FromWeight
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.super_tuning import FORMAT
from lightning_peft.methods.limits import FRACTION
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["SuperTuning"]


@register
@dataclass(frozen=True)
class SuperTuning(FromWeight):
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

    limits = {"sparsity": FRACTION}
    site_rules = (one_matrix,)
    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
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
        super().check(site)
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
