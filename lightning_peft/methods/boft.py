"""BOFT: a product of butterfly-permuted block rotations. Liu et al. 2023, arXiv:2311.06243."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.butterfly import butterfly, with_identities
from lightning_peft.core.edit import Edit
from lightning_peft.core.rotation import BlockRotation
from lightning_peft.core.site import Site
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require, require_either
from lightning_peft.methods.formats.boft import FORMAT
from lightning_peft.methods.limits import FRACTION, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import features_in, one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["BOFT", "butterfly"]


@register
@dataclass(frozen=True)
class BOFT(BiasOption):
    """y = s ⊙ ((x R) Wᵀ) + b, R = Π P_i diag(blocks_i) P_iᵀ, blocks Cayley transforms.

    The permutations are gathers and the blocks small products; R [in, in] is never formed.

    Attributes:
        block_size: Rows of a block; 0 where `block_num` is given.
        block_num: Number of blocks instead.
        n_butterfly: Stages m; in_features must be a multiple of block_size · 2^(m − 1).
        dropout: Probability of a block being the identity, in training, in one stage at random.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"boft_only"``.

    Raises:
        ValueError: not exactly one of block_size and block_num, n_butterfly < 1, dropout outside
            [0, 1).
    """

    block_size: int = 4
    block_num: int = 0
    n_butterfly: int = 1
    dropout: float = 0.0
    bias: Literal["none", "all", "boft_only"] = "none"

    limits = {"n_butterfly": at_least(1), "dropout": FRACTION}
    site_rules = (features_in, one_matrix)
    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require_either(self, "block_size", "block_num")

    def blocks(self, site: Site) -> tuple[int, int]:
        """(number, rows) of the blocks at this site."""
        n = site.in_features
        if self.block_num:
            return self.block_num, n // self.block_num
        return n // self.block_size, self.block_size

    def check(self, site: Site) -> None:
        """Blocks must tile the input, the butterfly must have two halves at each stage."""
        super().check(site)
        number, size = self.blocks(site)
        require(
            number >= 1 and number * size == site.in_features,
            f"{self.label} on {site.quoted}: expected blocks that tile in_features = "
            f"{site.in_features}, got block_size = {self.block_size}, block_num = "
            f"{self.block_num}; choose a divisor, or exclude the layer",
        )
        most = (number & -number).bit_length()  # `number` is a multiple of 2^(most - 1)
        require(
            self.n_butterfly == 1 or (self.n_butterfly <= most and number > 1),
            f"{self.label} on {site.quoted}: expected a number of blocks that is a multiple of "
            f"2^(n_butterfly - 1) with n_butterfly = {self.n_butterfly}, got {number}; lower "
            "n_butterfly",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """R [m, blocks, b, b] zeros, s [out] ones: the identity."""
        number, size = self.blocks(site)
        return {
            "R": empty_like_site(site, self.n_butterfly, number, size, size).zero_(),
            "s": torch.nn.init.ones_(empty_like_site(site, site.out_features)),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A rotation and an output scale; the bias is not scaled."""
        number, size = self.blocks(site)
        S = (p["R"] - p["R"].mT) / 2
        eye = torch.eye(size, dtype=torch.float32, device=S.device)
        wide = S.float()
        blocks = torch.linalg.solve(eye - wide, eye + wide).mT.to(S.dtype)
        if self.dropout and site.module.training:
            blocks = with_identities(blocks, self.dropout)
        stages: list[tuple[Tensor | None, Tensor]] = []
        for i in reversed(range(self.n_butterfly)):
            order = None
            if i:
                order = butterfly(site.in_features, number // 2**i, size).to(S.device)
            stages.append((order, blocks[i]))
        return Edit(rotation=BlockRotation(tuple(stages)), out_scale=p["s"])
