"""TinyLoRA: a few numbers per group of layers, along the weight's leading directions.
arXiv:2602.04118.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.formats.tinylora import FORMAT
from lightning_peft.methods.limits import FRACTION, at_least, between
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_shared, require_size
from lightning_peft.methods.triplets import FrozenTriplets, leading_triplets

__all__ = ["TinyLoRA"]


@register
@dataclass(frozen=True)
class TinyLoRA(FrozenTriplets, BiasOption):
    """ΔW = B (Σ_i v_i P_i) A with A = √S Vᵀ, B = U √S of the r leading triplets of W, frozen.

    Attributes:
        r: Triplets; at most as many as the weight has.
        u: Numbers of v, one vector per group of layers.
        weight_tying: 0: a group per layer; 1: one group.
        seed: Seed of the frozen random P [u, r, r]; layer i uses seed + i.
        init: v starts at ``"zeros"``, or ``"uniform"`` within ± `bound`.
        bound: See `init`.
        dropout: Probability of dropping an input element of the branch, in training.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"tinylora_only"``.

    Raises:
        ValueError: r or u below 1, weight_tying outside [0, 1], an unknown init, dropout outside
            [0, 1).
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    seed: int = 42
    init: Literal["zeros", "uniform"] = "zeros"
    bound: float = 0.02
    dropout: float = 0.0
    bias: Literal["none", "all", "tinylora_only"] = "none"

    limits = {
        "r": at_least(1),
        "u": at_least(1),
        "weight_tying": between(0, 1),
        "bound": at_least(0),
        "dropout": FRACTION,
    }
    site_rules = (one_matrix,)
    hf = FORMAT

    def _groups(self, layers: int) -> int:
        return max(1, round(layers * (1.0 - self.weight_tying)))

    def rank(self, site: Site) -> int:
        """Triplets at a site."""
        return min(self.r, site.in_features, site.out_features)

    def shared_parameters(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """v [groups, u]."""
        require_size(sites, self.u, *[max(self.rank(site) for site in sites)] * 2)
        v = empty_shared(sites, self._groups(len(sites)), self.u).zero_()
        return {"v": v if self.init == "zeros" else nn.init.uniform_(v, -self.bound, self.bound)}

    def site_buffers(self, sites: Sequence[Site]) -> Sequence[Mapping[str, Tensor]]:
        """P [u, r, r] normal, and the row of v: group [1]."""
        groups = self._groups(len(sites))
        size = max(1, len(sites) // groups)
        buffers = []
        for i, site in enumerate(sites):
            r = self.rank(site)
            generator = torch.Generator().manual_seed(self.seed + i)
            P = torch.normal(0.0, r**-0.5, (self.u, r, r), generator=generator)
            buffers.append({"P": P, "group": torch.tensor([min(i // size, groups - 1)])})
        return buffers

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """None of its own."""
        return {}

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """The leading singular triplets."""
        U, S, Vh = leading_triplets(W, self.rank(site))
        root = S.sqrt()
        p["A"], p["B"] = (root.unsqueeze(1) * Vh).contiguous(), (U * root).contiguous()
        return None

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change."""
        v = p["v"].index_select(0, p["group"])[0]
        R = torch.einsum("i,ijk->jk", v, p["P"].to(v.dtype))
        R = R.mT if site.is_embedding else R  # peft factors the transposed table there
        return Edit(terms=(LowRank(p["A"], p["B"] @ R),), dropout=self.dropout)
