"""HiRA: a low-rank factor of every entry, ΔW = W ∘ (B A). Huang et al. 2025, ICLR (openreview
TwJrTz9cRS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import FormedTerm
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import match_site
from lightning_peft.methods.exchange import config_keys, refuse_scaled_embedding
from lightning_peft.methods.limits import FRACTION, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["Hadamard", "HiRA"]


@dataclass(frozen=True)
class Hadamard(FormedTerm):
    """ΔW = W ∘ G with W [*batch, out, in] frozen."""

    W: Tensor
    G: Tensor

    def matrix(self) -> Tensor:
        """ΔW."""
        return self.W * self.G

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """One product with W + W ∘ G."""
        return F.linear(x, torch.addcmul(W, W, self.G), b)


def _refuse(method: HiRA, site: Site) -> str:
    if getattr(site.module, "groups", 1) > 1:
        return "peft adapts no convolution with groups here"
    if len(site.kernel_size) == 3 and site.kernel_size[:2] == (1, 1):
        return "peft takes a Conv3d whose kernel starts with 1, 1 for a Conv2d of size 1"
    return refuse_scaled_embedding(method, site)


@register
@dataclass(frozen=True)
class HiRA(WeightMethod):
    """W' = W ∘ (1 + B A): of high rank, with LoRA's count of numbers; zeros of W stay zeros.

    Attributes:
        r: Rank of the factor.
        rank_pattern: Layer name pattern → rank.
        dropout: Probability of dropping an input element of the branch, in training.

    Raises:
        ValueError: r < 1, dropout outside [0, 1).
    """

    r: int = 32
    rank_pattern: dict[str, int] = field(default_factory=dict)
    dropout: float = 0.0

    limits = {"r": at_least(1), "rank_pattern": at_least(1), "dropout": FRACTION}
    hf = HFFormat(
        peft_type="HIRA",
        tensors={"A": "hira_A", "B": "hira_B"},
        lookup={"A": "hira_embedding_A", "B": "hira_embedding_B"},
        axes={"A": "down", "B": "up"},
        config=config_keys("r", "rank_pattern", dropout="hira_dropout"),
        own_defaults=True,
        inert={"fan_in_fan_out": False, "init_weights": True},
        kinds=("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
        follows=("dilation",),
        refuse=_refuse,
    )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [r, in] random, B [out, r] zeros."""
        r = match_site(self.rank_pattern, site, self.r)
        return {
            "A": kaiming(empty_like_site(site, r, site.in_features)),
            "B": empty_like_site(site, site.out_features, r).zero_(),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The weight, read each time, times the low-rank factor."""
        G = p["B"] @ p["A"]
        return Edit(terms=(Hadamard(site.weight(G.dtype), G),), dropout=self.dropout)
