"""RandLoRA: frozen random low-rank bases, scaled, that add up to full rank. Albert et al. 2025,
arXiv:2502.00987.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import (
    empty_like_site,
    require,
    require_dropout,
    require_features,
    require_matrix,
)
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.registry import register

__all__ = ["RandLoRA"]


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """peft writes the shared bases once more per layer: equal copies are left out."""
    for name in ("A_copy", "B_copy"):
        copies = [e.tensors[name] for e in entries if name in e.tensors]
        if any(not torch.equal(copies[0], t) for t in copies[1:]):
            raise ValueError(
                f"adapter file: randlora_{name[0]}: expected the same bases in all layers, got "
                "copies that differ; nothing was loaded"
            )
    return {}


def _unpack(
    method: RandLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    return {k: t for k, t in p.items() if not k.endswith("_copy")}


def _pack_shared(
    entries: Sequence[HFEntry], shared: Mapping[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """The bases once more per layer, as peft 0.21 writes them: its load warns without."""
    places = ["base_model.", *(f"base_model.model.{e.path}." for e in entries)]
    return {f"{place}randlora_{name}": t.detach() for place in places for name, t in shared.items()}


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

    bias: str = "none"

    bias_word = "randlora_only"
    hf = HFFormat(
        peft_type="RANDLORA",
        tensors={
            "lam": "randlora_lambda",
            "gamma": "randlora_gamma",
            "A_copy": "randlora_A",
            "B_copy": "randlora_B",
        },
        prefix={"A": "base_model.randlora_A", "B": "base_model.randlora_B"},
        optional=("A", "B"),
        config=config_keys(
            "bias",
            "r",
            "sparse",
            "very_sparse",
            alpha="randlora_alpha",
            seed="projection_prng_key",
            dropout="randlora_dropout",
        ),
        own_defaults=True,
        inert={"fan_in_fan_out": False, "init_weights": True, "save_projection": True},
        unpack=_unpack,
        pack_shared=_pack_shared,
        from_config=_from_config,
        refuse=refuse_all_but_features,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self.r >= 1, f"{self.label}: expected r >= 1, got r = {self.r}")
        require(self.alpha > 0, f"{self.label}: expected alpha > 0, got {self.alpha}")
        require_dropout(self.label, self.dropout)

    def check(self, site: Site) -> None:
        """A matrix that acts on features."""
        require_features(self.label, site)
        require_matrix(self.label, site)

    def shared_buffers(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """A [r, 1, least], B [most, bases, r] by the largest in and out of all layers; drawn in
        bf16, as peft does, so that its files may leave them out.
        """
        sizes = max(s.out_features for s in sites), max(s.in_features for s in sites)
        least, most = min(sizes), max(sizes)
        bases = -(-least // self.r)
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
