"""BOFT: a product of butterfly-permuted block rotations. Liu et al. 2023, arXiv:2311.06243."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.rotation import BlockRotation
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat, WeightMethod
from lightning_peft.methods.checks import (
    empty_like_site,
    require,
    require_bias,
    require_shape,
)
from lightning_peft.methods.exchange import config_keys, refuse_uneven_conv2d
from lightning_peft.methods.registry import register

__all__ = ["BOFT", "butterfly"]


def butterfly(n: int, blocks: int, size: int) -> Tensor:
    """Order [n] of one stage: within each of `blocks` stretches, groups of `size` elements are
    taken even ones first, then odd ones.
    """
    groups = torch.arange(n).view(blocks, -1, size)
    return torch.cat([groups[:, 0::2], groups[:, 1::2]], dim=1).reshape(-1)


def _pack(method: BOFT, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"R": p["R"], "s": p["s"].reshape(_scale_shape(site))}


def _unpack(
    method: BOFT, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    if "s" in p:
        require_shape("boft_s", p["s"], _scale_shape(site))
    return {k: t.reshape(-1) if k == "s" else t for k, t in p.items()}


def _scale_shape(site: Site) -> tuple[int, int]:
    """[out, 1], and [1, out] on a convolution."""
    return (1, site.out_features) if site.kernel_size else (site.out_features, 1)


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """The number of stages is that of the tensors: without its CUDA extension peft trains one
    whatever the config says.
    """
    stages = {e.tensors["R"].shape[0] for e in entries if "R" in e.tensors and e.tensors["R"].ndim}
    return {"n_butterfly": stages.pop()} if len(stages) == 1 else {}


@register
@dataclass(frozen=True)
class BOFT(WeightMethod):
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

    hf = HFFormat(
        peft_type="BOFT",
        tensors={"R": "boft_R", "s": "boft_s"},
        config=config_keys(
            "bias",
            block_size="boft_block_size",
            block_num="boft_block_num",
            n_butterfly="boft_n_butterfly_factor",
            dropout="boft_dropout",
        ),
        own_defaults=True,
        inert={"fan_in_fan_out": False},
        ignored=("init_weights",),
        pack=_pack,
        unpack=_unpack,
        from_config=_from_config,
        kinds=("Linear", "Conv2d"),
        refuse=refuse_uneven_conv2d,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_bias(self.label, self.bias, "boft_only")
        size, number = self.block_size, self.block_num
        require(
            size >= 0 and number >= 0 and (size > 0) != (number > 0),
            f"{self.label}: expected exactly one of block_size and block_num above 0, got "
            f"block_size = {size}, block_num = {number}",
        )
        require(
            self.n_butterfly >= 1,
            f"{self.label}: expected n_butterfly >= 1, got {self.n_butterfly}",
        )
        require(
            0.0 <= self.dropout < 1.0,
            f"{self.label}: expected 0 <= dropout < 1, got dropout = {self.dropout}",
        )

    def blocks(self, site: Site) -> tuple[int, int]:
        """(number, rows) of the blocks at this site."""
        n = site.in_features
        if self.block_num:
            return self.block_num, n // self.block_num
        return n // self.block_size, self.block_size

    def check(self, site: Site) -> None:
        """Blocks must tile the input, the butterfly must have two halves at each stage."""
        require(
            not site.is_embedding and not site.batch_shape,
            f"{self.label} on {site.quoted}: expected one matrix with features for input, got "
            f"{'an embedding' if site.is_embedding else 'a stack of experts'}; exclude it",
        )
        number, size = self.blocks(site)
        require(
            number >= 1 and number * size == site.in_features,
            f"{self.label} on {site.quoted}: expected blocks that tile in_features = "
            f"{site.in_features}, got block_size = {self.block_size}, block_num = "
            f"{self.block_num}; choose a divisor, or exclude the layer",
        )
        stages = 2 ** (self.n_butterfly - 1)
        require(
            self.n_butterfly == 1 or (number % stages == 0 and number > 1),
            f"{self.label} on {site.quoted}: expected a number of blocks that is a multiple of "
            f"2^(n_butterfly - 1) = {stages}, got {number}; lower n_butterfly",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """R [m, blocks, b, b] zeros, s [out] ones: the identity."""
        number, size = self.blocks(site)
        return {
            "R": empty_like_site(site, self.n_butterfly, number, size, size).zero_(),
            "s": torch.nn.init.ones_(empty_like_site(site, site.out_features)),
        }

    def trained_biases(self) -> str:
        """Return the biases of the base that `bias` chooses."""
        return self.bias if self.bias in ("none", "all") else "adapted"

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A rotation and an output scale; the bias is not scaled."""
        number, size = self.blocks(site)
        S = (p["R"] - p["R"].mT) / 2
        eye = torch.eye(size, dtype=torch.float32, device=S.device)
        wide = S.float()
        blocks = torch.linalg.solve(eye - wide, eye + wide).mT.to(S.dtype)
        if self.dropout and site.module.training:
            blocks = self._dropped(blocks)
        stages: list[tuple[Tensor | None, Tensor]] = []
        for i in reversed(range(self.n_butterfly)):
            order = None
            if i:
                order = butterfly(site.in_features, number // 2**i, size).to(S.device)
            stages.append((order, blocks[i]))
        return Edit(rotation=BlockRotation(tuple(stages)), out_scale=p["s"])

    def _dropped(self, blocks: Tensor) -> Tensor:
        """Identity in place of a share of one stage's blocks."""
        m, number, size, _ = blocks.shape
        drop = torch.zeros(m, number, 1, 1, device=blocks.device, dtype=blocks.dtype)
        order = torch.randperm(number, device=blocks.device)[: int(self.dropout * number)]
        drop[torch.randint(0, m, ()), order] = 1.0
        eye = torch.eye(size, device=blocks.device, dtype=blocks.dtype)
        return (1 - drop) * blocks + drop * eye
