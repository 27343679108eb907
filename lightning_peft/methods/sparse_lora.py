"""SparseLoRA: LoRA that leaves zeros of the base at zero.  W' = W + [W ≠ 0] ∘ (s B A).

Merged, a pruned base is as sparse as before, and computes what was trained.

Source: masked low-rank updates of pruned weights, as in Zhang et al. 2023 (LoRAPrune,
arXiv:2305.18403) and Muñoz et al. 2024 (SparsePEFT, arXiv:2410.03750).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense
from lightning_peft.methods.checks import require
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register

__all__ = ["SparseLoRA"]


@register
@dataclass(frozen=True)
class SparseLoRA(LoRA):
    """LoRA for a base with zeros: pruned by magnitude, with N:M patterns, or by blocks.

    The change is formed, [out, in], in every forward and held for the backward: slower than LoRA,
    whose cost is two thin products. The mask is read from the weight each time; nothing of it is
    stored, and weights that are pruned during training stay zero from then on.

    Attributes:
        r, alpha, dropout, …: As for LoRA. The start must leave the base alone.

    Raises:
        ValueError: as LoRA; an init that rewrites the base, where zeros would not stay.
    """

    hf = None  # B A without the mask is another change: merge it

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            not self.rewrites_base and not self.needs_data,
            f"{self.label}: expected an init that leaves the base alone, got {self.init!r}, which "
            "would fill its zeros",
        )

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The masked change, as a whole."""
        A, B = p["A"], p["B"]
        s = self.scaling(site, A.shape[-2])
        kept = site.weight() != 0
        delta = torch.where(kept, s * (B @ A), 0.0)
        bias = s * p["bias_B"] if self.lora_bias else None
        return Edit(terms=(Dense(delta),), bias=bias, dropout=self.dropout)
