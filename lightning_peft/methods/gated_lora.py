"""GatedLoRA: LoRA whose branch is weighed by what the layer reads.

y = x Wᵀ + g(x) · s · (x Aᵀ) Bᵀ,  g = mean over tokens of σ(x · w + c).

Source: Mao et al. 2022, "UniPELT", section 3.2 (arXiv:2110.07577).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, NotMergeable, Term
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.limits import only
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["Gated", "GatedLoRA"]


@dataclass(frozen=True)
class Gated(Term):
    """A low-rank change times σ(x · w + c); w [in], c [1]; averaged over the last axis but one."""

    low_rank: LowRank
    w: Tensor
    c: Tensor
    averaged: bool

    def matrix(self) -> Tensor:
        """None: it depends on the input."""
        raise NotMergeable("its gate depends on the input, so that it is no change of the weight")

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """The branch, row by row times its gate."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.w.dtype)
        gate = torch.sigmoid(nn.functional.linear(x, self.w.unsqueeze(0)) + self.c)
        if self.averaged and x.dim() > 2:
            gate = gate.mean(dim=-2, keepdim=True)
        return self.low_rank.apply(ops, site, x) * gate


@register
@dataclass(frozen=True)
class GatedLoRA(LoRA):
    """LoRA with a gate in each layer, trained with it. It has no merged form.

    Attributes:
        gate: ``"sequence"``: one value for a text, the mean over its tokens, as in the paper.
            ``"token"``: each token its own, so that generating with a cache equals a full forward
            and no token sees a later one.

    Raises:
        ValueError: as LoRA; lora_bias; freeze_A; an init that changes the base, which the gate
            would not give back.
    """

    gate: Literal["sequence", "token"] = "sequence"

    limits = {"lora_bias": only(False), "freeze_A": only(False)}
    hf: ClassVar[HFFormat | None] = None
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            not self.rewrites_base and not self.needs_data,
            f"{self.label}: expected an init that leaves the base alone, got {self.init!r}",
        )

    def check(self, site: Site) -> None:
        """A layer whose input ends in features."""
        super().check(site)
        require(
            site.ops.features_last and not site.batch_shape,
            f"{self.label} on {site.quoted}: expected a linear layer, got "
            f"{type(site.module).__name__}; exclude it or use LoRA there",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A and B as LoRA; w [in] normal with std 0.02, c [1] zero."""
        w = nn.init.normal_(empty_like_site(site, site.in_features), std=0.02)
        return {**super().parameters(site), "w": w, "c": empty_like_site(site, 1).zero_()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """LoRA's change, gated."""
        (term,) = super().edit(p, site).terms
        assert isinstance(term, LowRank)
        gated = Gated(term, p["w"], p["c"], self.gate == "sequence")
        return Edit(terms=(gated,), dropout=self.dropout)
