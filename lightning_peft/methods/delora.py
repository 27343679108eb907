"""DeLoRA: low rank with bounded norm, angles and strength apart. Bini et al. 2025,
arXiv:2503.18225.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import FromWeight, HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import match_site
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.limits import FRACTION, above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["DeLoRA"]

_LEAST = 1e-4  # of a norm


@register
@dataclass(frozen=True)
class DeLoRA(FromWeight, BiasOption):
    """ΔW = B diag(λ / (r |a_i| |b_i|)) A diag(w), w_j the norm of column j of W at the start.

    Attributes:
        r: Rank.
        strength: Start of λ, which bounds ‖ΔW‖ relative to the weight.
        rank_pattern: Layer name pattern → rank.
        strength_pattern: Layer name pattern → strength.
        dropout: Probability of dropping an input element of the branch, in training.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"delora_only"``.

    Raises:
        ValueError: r < 1, strength ≤ 0, dropout outside [0, 1).
    """

    r: int = 8
    strength: float = 15.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    strength_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"

    limits = {
        "r": at_least(1),
        "rank_pattern": at_least(1),
        "strength": above(0),
        "strength_pattern": above(0),
        "dropout": FRACTION,
    }
    hf = HFFormat(
        peft_type="DELORA",
        tensors={"A": "delora_A", "B": "delora_B", "lam": "delora_lambda", "w": "delora_w_norm"},
        axes={"A": "down", "B": "up"},
        config=config_keys(
            "bias",
            "r",
            "rank_pattern",
            strength="delora_lambda",
            strength_pattern="lambda_pattern",
            dropout="module_dropout",
        ),
        own_defaults=True,
        inert={"init_weights": True},
        refuse=refuse_all_but_linear,
    )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [r, in] random, B [out, r] zeros, lam [1] at the strength."""
        r = match_site(self.rank_pattern, site, self.r)
        strength = match_site(self.strength_pattern, site, self.strength)
        return {
            "A": kaiming(empty_like_site(site, r, site.in_features)),
            "B": empty_like_site(site, site.out_features, r).zero_(),
            "lam": empty_like_site(site, 1).fill_(strength),
        }

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """w [in], filled from the weight."""
        return {"w": empty_like_site(site, site.in_features).zero_()}

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """The norms of the columns of W."""
        p["w"] = W.norm(dim=-2)
        return None

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change."""
        A, B = p["A"], p["B"]
        norms = A.norm(dim=-1).clamp(min=_LEAST) * B.norm(dim=-2).clamp(min=_LEAST)
        strengths = p["lam"] / (A.shape[-2] * norms)
        term = LowRank(A * p["w"].unsqueeze(-2), B * strengths.unsqueeze(-2))
        return Edit(terms=(term,), dropout=self.dropout)
