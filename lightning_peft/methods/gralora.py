"""GraLoRA: a low-rank change of its own for each of k × k blocks. Jung et al. 2025,
arXiv:2505.20355.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.granular import Granular
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, Term
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.limits import FRACTION, above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix, require_divisor
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["GraLoRA", "Granular"]


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
    bias: Literal["none", "all", "gralora_only"] = "none"

    limits = {
        "r": at_least(1),
        "k": at_least(1),
        "alpha": above(0),
        "hybrid_r": at_least(0),
        "dropout": FRACTION,
    }
    site_rules = (one_matrix,)
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
            self.r % self.k == 0,
            f"{self.label}: expected k that divides r, got r = {self.r}, k = {self.k}",
        )

    def check(self, site: Site) -> None:
        """Blocks tile the weight."""
        super().check(site)
        require_divisor(self, site, "k", self.k)

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
