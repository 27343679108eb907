"""OFT: features rotated by an orthogonal block-diagonal matrix, W' = W Rᵀ. Qiu et al. 2023,
arXiv:2306.07280; input side as in OFTv2, arXiv:2506.19847.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.rotation import BlockRotation, neumann
from lightning_peft.core.site import Site
from lightning_peft.core.skew import cayley, skew
from lightning_peft.methods.base import HFEntry, HFFormat, WeightMethod
from lightning_peft.methods.checks import empty_like_site, require, require_bias
from lightning_peft.methods.exchange import config_keys
from lightning_peft.methods.registry import register

__all__ = ["OFT", "nearest_divisor"]


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n closest to `wanted`; the smaller of two."""
    distance = 0
    while True:  # outwards: most often none
        for d in (wanted - distance, wanted + distance):
            if 1 <= d <= n and n % d == 0:
                return d
        distance += 1


def _features(site: Site) -> int:
    """Width of what is rotated: the input, or an embedding's output."""
    return site.out_features if site.is_embedding else site.in_features


def _refuse(method: OFT, site: Site) -> str:
    if site.is_embedding:
        return ""
    if any(k != 1 for k in site.kernel_size):
        return "peft folds overlapping patches into sums there: its output differs at the start"
    return ""


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    """Exactly one of both is set."""
    config["r" if config["oft_block_size"] else "oft_block_size"] = 0


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    version = str(config.get("peft_version") or "9.9").split(".")[:2]
    if [int(x) for x in version if x.isdigit()] < [0, 16]:
        raise ValueError(
            "adapter_config.json: OFT: expected a file of peft 0.16 or newer, got one of "
            f"{config['peft_version']}, whose rotations act on the other side; convert it with peft"
        )
    return {}


@register
@dataclass(frozen=True)
class OFT(WeightMethod):
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

    hf = HFFormat(
        peft_type="OFT",
        tensors={"triangle": "oft_R.weight"},
        lookup={"triangle": "oft_embedding_R.weight"},
        config=config_keys(
            "bias",
            "r",
            "block_share",
            "coft",
            "eps",
            block_size="oft_block_size",
            cayley_neumann="use_cayley_neumann",
            terms="num_cayley_neumann_terms",
        ),
        own_defaults=True,
        inert={"module_dropout": 0.0, "fan_in_fan_out": False},
        defaults={"use_cayley_neumann": True},
        ignored=("init_weights",),
        to_config=_to_config,
        from_config=_from_config,
        kinds=("Linear", "Conv2d", "Embedding"),
        refuse=_refuse,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_bias(self.label, self.bias, "oft_only")
        require(
            self.block_size >= 0 and self.r >= 0 and (self.block_size > 0) != (self.r > 0),
            f"{self.label}: expected exactly one of block_size and r above 0, got "
            f"block_size = {self.block_size}, r = {self.r}",
        )
        require(self.terms >= 1, f"{self.label}: expected terms >= 1, got {self.terms}")
        require(self.eps > 0, f"{self.label}: expected eps > 0, got {self.eps}")

    def check(self, site: Site) -> None:
        """A rotation of features, not of a stack of matrices."""
        require(
            not site.batch_shape,
            f"{self.label} on {site.quoted}: expected one matrix, got a stack of experts; "
            "exclude it or use LoRA there",
        )
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

    def trained_biases(self) -> str:
        """Return the biases of the base that `bias` chooses."""
        return self.bias if self.bias in ("none", "all") else "adapted"

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A rotation of the input; of an embedding's output, whose input is ids."""
        b = self.block(site)
        Q = skew(p["triangle"], b)
        if self.coft:
            Q = Q + (self._near(Q) - Q).detach()
        R = neumann(Q, self.terms) if self.cayley_neumann else cayley(Q)
        if self.block_share:
            R = R.expand(_features(site) // b, b, b)
        turn = BlockRotation(((None, R),))
        return Edit(out_map=turn) if site.is_embedding else Edit(rotation=turn)

    def _near(self, Q: Tensor) -> Tensor:
        eps = self.eps / len(Q) ** 0.5
        norm = torch.linalg.matrix_norm(Q, keepdim=True)
        return torch.where(norm <= eps, Q, eps * Q / norm)
