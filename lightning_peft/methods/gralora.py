"""GraLoRA: a low-rank change of its own for each of k × k blocks. Jung et al. 2025,
arXiv:2505.20355.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, LowRank, Term
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import (
    empty_like_site,
    kaiming,
    require,
    require_dropout,
    require_matrix,
)
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.registry import register

__all__ = ["GraLoRA", "Granular"]


@dataclass(frozen=True)
class Granular(Term):
    """Block (j, n) of ΔW = s (A_n[:, slice j] B_j[slice n])ᵀ, slices of r/k.

    Attributes:
        A: [k, in/k, r].
        B: [k, r, out/k].
        scaling: s.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        k, width, r = self.A.shape
        A = self.A.view(k, width, k, r // k)
        B = self.B.view(k, k, r // k, -1)
        blocks = torch.einsum("nijq,jnqo->joni", A, B)
        return self.scaling * blocks.reshape(-1, k * width)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two batched products with a permutation between."""
        if not ops.features_last:
            return Dense(self.matrix()).apply(ops, site, x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        k, width, r = self.A.shape
        h = torch.bmm(x.reshape(-1, k, width).transpose(0, 1), self.A)  # [n, M, (j, q)]
        M = h.shape[1]
        h = h.view(k, M, k, r // k).permute(2, 1, 0, 3).reshape(k, M, r)  # [j, M, (n, q)]
        y = torch.bmm(h * self.scaling, self.B).transpose(0, 1)
        return y.reshape(*x.shape[:-1], y.shape[-2] * y.shape[-1])


@register
@dataclass(frozen=True)
class GraLoRA(BiasOption):
    """k × k blocks of rank r/k, as many numbers as LoRA of rank r.

    Attributes:
        r: Rank of a block row; k divides it.
        alpha: Scale numerator: s = alpha / (r + hybrid_r).
        k: Blocks each way; divides in_features and out_features.
        hybrid_r: Rank of a plain low-rank change beside, 0 for none.
        dropout: Probability of dropping an input element of the branch, in training.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"gralora_only"``.

    Raises:
        ValueError: r, alpha or k below 1, k that does not divide r, hybrid_r < 0, dropout outside
            [0, 1).
    """

    r: int = 32
    alpha: float = 64.0
    k: int = 2
    hybrid_r: int = 0
    dropout: float = 0.0

    bias: str = "none"

    bias_word = "gralora_only"
    hf = HFFormat(
        peft_type="GRALORA",
        tensors={
            "A": "gralora_A",
            "B": "gralora_B",
            "Ag": "gralora_A_general.weight",
            "Bg": "gralora_B_general.weight",
        },
        config=config_keys(
            "bias", "r", "alpha", "hybrid_r", k="gralora_k", dropout="gralora_dropout"
        ),
        own_defaults=True,
        inert={"fan_in_fan_out": False, "init_weights": True},
        refuse=refuse_all_but_features,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            self.k >= 1 and self.r >= 1 and self.r % self.k == 0,
            f"{self.label}: expected k >= 1 that divides r, got r = {self.r}, k = {self.k}",
        )
        require(self.alpha > 0, f"{self.label}: expected alpha > 0, got {self.alpha}")
        require(self.hybrid_r >= 0, f"{self.label}: expected hybrid_r >= 0, got {self.hybrid_r}")
        require_dropout(self.label, self.dropout)

    def check(self, site: Site) -> None:
        """Blocks tile the weight."""
        require_matrix(self.label, site)
        require(
            site.in_features % self.k == 0 and site.out_features % self.k == 0,
            f"{self.label} on {site.quoted}: expected k that divides in_features = "
            f"{site.in_features} and out_features = {site.out_features}, got k = {self.k}; choose "
            "another or exclude the layer",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A random, B zeros."""
        width, height, k = site.in_features, site.out_features, self.k
        A = kaiming(empty_like_site(site, k, self.r, width // k))
        p = {
            "A": A.mT.contiguous(),
            "B": empty_like_site(site, k, self.r, height // k).zero_(),
        }
        if self.hybrid_r:
            p["Ag"] = kaiming(empty_like_site(site, self.hybrid_r, width))
            p["Bg"] = empty_like_site(site, height, self.hybrid_r).zero_()
        return p

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A granular change, and a plain one beside."""
        s = self.alpha / (self.r + self.hybrid_r)
        terms: tuple[Term, ...] = (Granular(p["A"], p["B"], s),)
        if self.hybrid_r:
            terms += (LowRank(p["Ag"], p["Bg"], s),)
        return Edit(terms=terms, dropout=self.dropout)
