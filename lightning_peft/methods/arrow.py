"""Arrow: every token goes to the low-rank changes that its input fits. Ostapenko et al. 2024,
arXiv:2405.11157.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.mixtures import Routed
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import WeightMethod
from lightning_peft.methods.checks import match_site, require
from lightning_peft.methods.limits import above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["Arrow", "stacked_experts"]


def stacked_experts(terms: Sequence[LowRank]) -> dict[str, Tensor]:
    """Return the tensors of `Routed` for these changes."""
    As = [t.A.float() for t in terms]
    Bs = [t.scaling * t.B.float() for t in terms]
    vectors = []
    for A, B in zip(As, Bs, strict=True):
        Q, R = torch.linalg.qr(A.mT)  # A = Rᵀ Qᵀ
        core = torch.linalg.qr(B)[1] @ R.mT  # its right singular vectors, turned by Q, are B A's
        vectors.append(Q @ torch.linalg.svd(core, full_matrices=False)[2][0])
    ranks = torch.tensor([len(A) for A in As])
    return {
        "A": torch.cat(As),
        "B": torch.cat(Bs, dim=1),
        "v": torch.stack(vectors),
        "owner": torch.repeat_interleave(torch.arange(len(As)), ranks),
    }


@register
@dataclass(frozen=True)
class Arrow(WeightMethod):
    """Several low-rank adapters in one, mixed for each token without training.

    `lightning_peft.route` makes one from attached adapters. Nothing is trained, and it has no
    merged form.

    Attributes:
        experts: Names of the adapters that it was made from.
        ranks: Layer name → rank of each expert there; experts without the layer are left out.
        top_k: Experts per token.
        temperature: Divides the fit of an expert before the softmax.

    Raises:
        ValueError: no experts, top_k < 1, temperature ≤ 0.
    """

    experts: list[str] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    top_k: int = 3
    temperature: float = 1.0

    mergeable: ClassVar[bool] = False

    limits = {"top_k": at_least(1), "temperature": above(0)}

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            bool(self.experts) and bool(self.ranks),
            f"{self.label}: expected experts and their ranks, got {self.experts}, {self.ranks}; "
            "make one with lightning_peft.route(model, names, into)",
        )

    def check(self, site: Site) -> None:
        """A linear layer that the experts adapt."""
        require(
            site.ops.features_last and not site.batch_shape and not site.is_embedding,
            f"{self.label} on {site.quoted}: expected a linear layer, got "
            f"{type(site.module).__name__}; leave it out of the adapters that are routed",
        )
        require(
            bool(match_site(self.ranks, site, [])),
            f"{self.label} on {site.quoted}: expected a layer of ranks, got one without experts",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Nothing is trained."""
        return {}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """A, B, v and owner, as `stacked_experts` fills them."""
        ranks = match_site(self.ranks, site, [])
        R = sum(ranks)
        return {
            "A": empty_like_site(site, R, site.in_features).zero_(),
            "B": empty_like_site(site, site.out_features, R).zero_(),
            "v": empty_like_site(site, len(ranks), site.in_features).zero_(),
            "owner": torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The routed change."""
        term = Routed(p["A"], p["B"], p["v"], p["owner"], self.top_k, self.temperature)
        return Edit(terms=(term,))
