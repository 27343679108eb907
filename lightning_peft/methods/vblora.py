"""VB-LoRA: low-rank factors mixed from one bank of vectors. Li et al. 2024, arXiv:2405.15179."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.vblora import FORMAT
from lightning_peft.methods.limits import FRACTION, above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix, require_divisor
from lightning_peft.methods.tensors import empty_like_site, empty_shared

__all__ = ["VBLoRA"]


@register
@dataclass(frozen=True)
class VBLoRA(BiasOption):
    """ΔW = B A; every stretch of A [r, in] and B [out, r] is a mixture of the bank's vectors.

    The output changes a little at the start, as in peft.

    Attributes:
        r: Rank.
        num_vectors: Vectors of the bank, which all layers share.
        vector_length: Their length; divides in_features and out_features.
        topk: Vectors that are mixed in each stretch, weighted by the softmax of their logits.
        dropout: Probability of dropping an input element of the branch, in training.
        bank_bound: The bank starts uniform within ± this.
        logits_std: Standard deviation of the logits at the start.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"vblora_only"``.

    Raises:
        ValueError: a number below 1, topk > num_vectors, dropout outside [0, 1).
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    dropout: float = 0.0
    bank_bound: float = 0.02
    logits_std: float = 0.1
    bias: Literal["none", "all", "vblora_only"] = "none"

    limits = {
        "r": at_least(1),
        "num_vectors": at_least(1),
        "vector_length": at_least(1),
        "topk": at_least(1),
        "bank_bound": above(0, ", since from zero the bank is never trained"),
        "logits_std": at_least(0),
        "dropout": FRACTION,
    }
    site_rules = (one_matrix,)
    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            self.topk <= self.num_vectors,
            f"{self.label}: expected topk <= num_vectors = {self.num_vectors}, got {self.topk}",
        )

    def check(self, site: Site) -> None:
        """Stretches tile both sides."""
        super().check(site)
        require_divisor(self, site, "vector_length", self.vector_length)

    def shared_parameters(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """bank [num_vectors, vector_length]."""
        bank = empty_shared(sites, self.num_vectors, self.vector_length)
        return {"bank": nn.init.uniform_(bank, -self.bank_bound, self.bank_bound)}

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Logits A [r, in/b, n], B [out/b, r, n] of the bank's n vectors, normal."""
        n, b = self.num_vectors, self.vector_length
        A = empty_like_site(site, self.r, site.in_features // b, n)
        B = empty_like_site(site, site.out_features // b, self.r, n)
        return {
            "A": nn.init.normal_(A, std=self.logits_std),
            "B": nn.init.normal_(B, std=self.logits_std),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change."""
        A = self._mixed(p["A"], p["bank"]).flatten(1)
        B = self._mixed(p["B"], p["bank"]).transpose(1, 2).reshape(site.out_features, self.r)
        return Edit(terms=(LowRank(A, B),), dropout=self.dropout)

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        chosen, at = logits.topk(self.topk, dim=-1)
        return (chosen.softmax(-1).unsqueeze(-1) * bank[at]).sum(-2)
