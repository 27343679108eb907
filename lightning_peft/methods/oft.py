"""OFT: features rotated by an orthogonal block-diagonal matrix, W' = W Rᵀ. Qiu et al. 2023,
arXiv:2306.07280; input side as in OFTv2, arXiv:2506.19847.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.rotation import BlockRotation, nearest_divisor, neumann
from lightning_peft.core.site import Site
from lightning_peft.core.skew import cayley, near_zero, skew
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require, require_either
from lightning_peft.methods.formats.oft import FORMAT
from lightning_peft.methods.limits import above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["OFT", "nearest_divisor"]


def _features(site: Site) -> int:
    """Width of what is rotated: the input, or an embedding's output."""
    return site.out_features if site.is_embedding else site.in_features


@register
@dataclass(frozen=True)
class OFT(BiasOption):
    """y = (x R) Wᵀ + b, R = diag of blocks (I − Q)⁻¹-like Cayley transforms of skew-symmetric Q.

    Attributes:
        block_size: Rows of a block; if it does not divide the input's size, the nearest divisor is
            used. 0 if `r` is given.
        r: Number of blocks, instead of `block_size`.
        block_share: If True, all blocks share their values.
        coft: Keep each Q within `eps` of zero.
        eps: Largest distance of Q from zero, with `coft`.
        cayley_neumann: Approximate the transform by a Neumann series: cheaper on large blocks, not
            orthogonal for large Q. If False, the transform is exact.
        terms: Number of terms of the Neumann series; 3 are computed as 4, as in peft.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"oft_only"``.

    Raises:
        ValueError: not exactly one of block_size and r, terms < 1, eps ≤ 0.
    """

    block_size: int = 32
    r: int = 0
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5
    cayley_neumann: bool = False
    terms: int = 5
    bias: Literal["none", "all", "oft_only"] = "none"

    limits = {"terms": at_least(1), "eps": above(0)}
    site_rules = (one_matrix,)
    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require_either(self, "block_size", "r")

    def check(self, site: Site) -> None:
        """A rotation of features, not of a stack of matrices."""
        super().check(site)
        require(
            self.block(site) > 1,
            f"{self.label} on {site.quoted}: expected blocks of two rows at least, got 1 "
            f"(features = {_features(site)}), which rotates nothing; choose another block_size "
            "or exclude the layer",
        )
        require(
            not self.r or _features(site) % self.r == 0,
            f"{self.label} on {site.quoted}: expected a number of blocks that divides the width "
            f"({_features(site)}), got r = {self.r}; give block_size instead",
        )

    def block(self, site: Site) -> int:
        """Rows of a block at this site."""
        if self.r:
            return _features(site) // self.r
        return nearest_divisor(_features(site), self.block_size)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """triangle [blocks, b(b − 1)/2] zeros: R = I."""
        b = self.block(site)
        blocks = 1 if self.block_share else _features(site) // b
        return {"triangle": empty_like_site(site, blocks, b * (b - 1) // 2).zero_()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A rotation of the input; of an embedding's output, whose input is ids."""
        b = self.block(site)
        Q = skew(p["triangle"], b)
        if self.coft:
            Q = Q + (near_zero(Q, self.eps) - Q).detach()
        R = neumann(Q, self.terms) if self.cayley_neumann else cayley(Q)
        if self.block_share:
            R = R.expand(_features(site) // b, b, b)
        turn = BlockRotation(((None, R),))
        return Edit(out_map=turn) if site.is_embedding else Edit(rotation=turn)
