"""RandLoRA: frozen random low-rank bases, scaled, that add up to full rank. Albert et al. 2025,
arXiv:2502.00987.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.formats.randlora import FORMAT
from lightning_peft.methods.limits import FRACTION, above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import features_in, one_matrix
from lightning_peft.methods.tensors import empty_like_site, require_size

__all__ = ["RandLoRA"]


@register
@dataclass(frozen=True)
class RandLoRA(BiasOption):
    """ΔW = (alpha / r) Σ_j B_j diag(λ_j) A diag(γ_j), A and B_j random and shared, λ and γ trained.

    The number of bases makes ΔW of full rank, so it is formed. A step of λ moves the output twenty
    times as far as LoRA's at the default alpha: choose a lower learning rate.

    Attributes:
        r: Rank of a base; min(in, out) / r bases, rounded up.
        alpha: Scale numerator.
        seed: Seed of the frozen factors.
        sparse: Ternary bases, a third of whose entries are not zero.
        very_sparse: The same, fewer: 1 in √(smallest width).
        dropout: Probability of dropping an input element of the branch, in training.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"randlora_only"``.

    Raises:
        ValueError: r < 1, alpha ≤ 0, dropout outside [0, 1).
    """

    r: int = 32
    alpha: float = 640.0
    seed: int = 0
    sparse: bool = False
    very_sparse: bool = False
    dropout: float = 0.0
    bias: Literal["none", "all", "randlora_only"] = "none"

    limits = {"r": at_least(1), "alpha": above(0), "dropout": FRACTION}
    site_rules = (features_in, one_matrix)
    hf = FORMAT

    def shared_buffers(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """A [r, 1, least], B [most, bases, r] by the largest in and out of all layers; drawn in
        bf16, as peft does, so that its files may leave them out.
        """
        sizes = max(s.out_features for s in sites), max(s.in_features for s in sites)
        least, most = min(sizes), max(sizes)
        bases = -(-least // self.r)
        require_size(sites, self.r, least)
        require_size(sites, most, bases, self.r)
        if sites[0].device.type == "meta":
            A, B = torch.empty(self.r, 1, least), torch.empty(most, bases, self.r)
            return {"A": A.to("meta"), "B": B.to("meta")}
        generator = torch.Generator().manual_seed(self.seed)
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (math.sqrt(least) if self.very_sparse else 3))
            A, B = (
                torch.rand(shape, generator=generator)
                for shape in ((self.r, 1, least), (most, bases, self.r))
            )
            A, B = ((t > 1 - share).float() - (t < share).float() for t in (A, B))
        else:
            A = _uniform((self.r, 1, least), generator)
            B = torch.cat([_uniform((most, 1, self.r), generator) for _ in range(bases)], dim=1)
        return {"A": (A / A.std()).float(), "B": (B / B.std()).float()}

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """lam [r, n] zeros, gamma [n, min(in, out)] at 1 / max(in, out)."""
        sizes = site.out_features, site.in_features
        bases = -(-min(sizes) // self.r)
        return {
            "lam": empty_like_site(site, self.r, bases).zero_(),
            "gamma": empty_like_site(site, bases, min(sizes)).fill_(1 / max(sizes)),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """ΔW, formed. peft flattens both factors in another order, (i, j) and (j, i); so do we."""
        lam, gamma = p["lam"], p["gamma"]
        least, most = sorted((site.out_features, site.in_features))
        A = p["A"][:, :, :least].to(lam.dtype)
        a = (lam.unsqueeze(-1) * A * gamma).flatten(0, 1)
        b = p["B"][:most, : lam.shape[1]].flatten(1).to(lam.dtype)
        delta = b @ a if site.in_features == least else (b @ a).mT
        return Edit(terms=(Dense(self.alpha / self.r * delta),), dropout=self.dropout)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = √5 over the last axis, in bf16."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)
