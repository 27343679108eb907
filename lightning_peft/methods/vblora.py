"""VB-LoRA: low-rank factors mixed from one bank of vectors. Li et al. 2024, arXiv:2405.15179."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import (
    empty_like_site,
    empty_shared,
    require,
    require_dropout,
    require_matrix,
)
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.registry import register

__all__ = ["VBLoRA"]


def _unpack(
    method: VBLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Logits; where a file holds the chosen vectors and their weights alone, log w there and −∞
    elsewhere: the same output, but training cannot choose others.
    """
    found = {k: t for k, t in p.items() if k in ("A", "B")}
    for name in ("A", "B"):
        if f"{name}_at" not in p:
            continue
        at, w = p[f"{name}_at"].long(), p[f"{name}_w"]
        require(
            at.shape[-1] == method.topk and w.shape == (*at.shape[:-1], method.topk - 1),
            f"expected {method.topk} indices and {method.topk - 1} weights per vector, got "
            f"{list(at.shape)} and {list(w.shape)}",
        )
        require(
            int(at.min()) >= 0 and int(at.max()) < method.num_vectors,
            f"expected indices from 0 to {method.num_vectors - 1}, got {int(at.min())} to "
            f"{int(at.max())}",
        )
        w = torch.cat((w, 1 - w.sum(-1, keepdim=True)), dim=-1)
        nothing = w.new_full((*at.shape[:-1], method.num_vectors), -torch.inf)
        found[name] = nothing.scatter(-1, at, w.log())
    return found


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

    bias: str = "none"

    bias_word = "vblora_only"
    hf = HFFormat(
        peft_type="VBLORA",
        tensors={
            "A": "vblora_logits_A",
            "B": "vblora_logits_B",
            "A_at": "vblora_logits_A_topk_indices",
            "A_w": "vblora_logits_A_topk_weights",
            "B_at": "vblora_logits_B_topk_indices",
            "B_w": "vblora_logits_B_topk_weights",
        },
        integers=("A_at", "B_at"),
        prefix={"bank": "base_model.vblora_vector_bank"},
        config=config_keys(
            "bias",
            "r",
            "num_vectors",
            "vector_length",
            "topk",
            dropout="vblora_dropout",
            bank_bound="init_vector_bank_bound",
            logits_std="init_logits_std",
        ),
        own_defaults=True,
        inert={"fan_in_fan_out": False, "save_only_topk_weights": False},
        unpack=_unpack,
        refuse=refuse_all_but_features,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            value = getattr(self, name)
            require(value >= 1, f"{self.label}: expected {name} >= 1, got {value}")
        require(
            self.topk <= self.num_vectors,
            f"{self.label}: expected topk <= num_vectors = {self.num_vectors}, got {self.topk}",
        )
        require(
            self.bank_bound > 0,
            f"{self.label}: expected bank_bound > 0, since from zero the bank is never trained, "
            f"got {self.bank_bound}",
        )
        require(
            self.logits_std >= 0,
            f"{self.label}: expected logits_std >= 0, got {self.logits_std}",
        )
        require_dropout(self.label, self.dropout)

    def check(self, site: Site) -> None:
        """Stretches tile both sides."""
        require_matrix(self.label, site)
        b = self.vector_length
        require(
            site.in_features % b == 0 and site.out_features % b == 0,
            f"{self.label} on {site.quoted}: expected vector_length that divides in_features = "
            f"{site.in_features} and out_features = {site.out_features}, got {b}; choose another "
            "or exclude the layer",
        )

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
