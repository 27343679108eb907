"""PSOFT: a rotation in the space of a weight's leading directions. Openreview FSHrinMArK, 2025."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.rotation import neumann
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.formats.psoft import FORMAT
from lightning_peft.methods.limits import FRACTION, above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix, rank_within_layer
from lightning_peft.methods.tensors import empty_like_site
from lightning_peft.methods.triplets import FrozenTriplets, leading_triplets

__all__ = ["PSOFT"]


@register
@dataclass(frozen=True)
class PSOFT(FrozenTriplets):
    """ΔW = s B (R − I) A; B A are the weight's r leading triplets, R = diag(b) C diag(a).

    C = (I + Q)(I − Q)⁻¹ is orthogonal, with Q skew-symmetric. s cancels in ΔW: B is divided by it.

    Files hold R alone, as peft's do. On loading, A and B come from the weight again; where another
    linear-algebra library returns a singular vector with the other sign, R no longer fits.

    Attributes:
        r: Triplets; at most min(in_features, out_features).
        alpha: Scale numerator, s = alpha / r; it changes the split of the triplets alone.
        orthogonal: If False, C is a full matrix.
        mag_a, mag_b: Whether the diagonals are trained; without one it is 1.
        split: ``"psoft_init"``: A has orthonormal rows; ``"pissa_init"``: A and B share the
            singular values.
        dropout: Probability of dropping an input element of the branch, in training.
        cayley_neumann: Approximate C by a Neumann series, which is not orthogonal for large Q.
        terms: Number of terms of the series; 3 are computed as 4, as in peft.
        eps: Largest norm of Q in the series; None for no bound.

    Raises:
        ValueError: r < 1, alpha not above 0, an unknown split, dropout outside [0, 1), terms < 1,
            eps not above 0.
    """

    r: int = 32
    alpha: float = 32.0
    orthogonal: bool = True
    mag_a: bool = True
    mag_b: bool = True
    split: Literal["psoft_init", "pissa_init"] = "psoft_init"
    dropout: float = 0.0
    cayley_neumann: bool = False
    terms: int = 5
    eps: float | None = None

    limits = {
        "r": at_least(1),
        "alpha": above(0),
        "dropout": FRACTION,
        "terms": at_least(1),
        "eps": above(0),
    }
    site_rules = (one_matrix, rank_within_layer)
    hf = FORMAT

    def rank(self, site: Site) -> int:
        """Triplets at a site."""
        return self.r

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """q zeros (the upper triangle of Q), or C = I; a and b [r] ones."""
        r = self.r
        q = empty_like_site(site, r * (r - 1) // 2).zero_()
        full = torch.nn.init.eye_(empty_like_site(site, r, r))
        trained = {"a": self.mag_a, "b": self.mag_b}
        ones = {k: empty_like_site(site, r).fill_(1.0) for k, on in trained.items() if on}
        return {"q": q if self.orthogonal else full, **ones}

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """The leading singular triplets."""
        U, S, Vh = leading_triplets(W, self.r)
        S = S * self.r / self.alpha
        if self.split == "psoft_init":
            p["A"], p["B"] = Vh.contiguous(), U * S
        else:
            p["A"], p["B"] = S.sqrt().unsqueeze(1) * Vh, U * S.sqrt()
        return None

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change."""
        q = p["q"]
        eye = torch.eye(self.r, dtype=q.dtype, device=q.device)
        R = self._cayley(q, eye) if self.orthogonal else q
        R = p["b"].unsqueeze(1) * R if self.mag_b else R
        R = R * p["a"] if self.mag_a else R
        low_rank = LowRank(p["A"], p["B"] @ (R - eye), self.alpha / self.r)
        return Edit(terms=(low_rank,), dropout=self.dropout)

    def _cayley(self, q: Tensor, eye: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(self.r, self.r, 1, device=q.device)
        upper = torch.zeros_like(eye).index_put((rows, columns), q)
        Q = upper - upper.mT
        if self.cayley_neumann:
            if self.eps is not None:
                norm = torch.linalg.matrix_norm(Q)
                Q = torch.where(norm > self.eps, Q * (self.eps / (norm + 1e-12)), Q)
            return neumann(Q, self.terms)
        wide = (eye + Q).float() if q.dtype.itemsize < 4 else eye + Q
        # X (I − Q) = I + Q, where I − Q = (I + Q)ᵀ.
        R: Tensor = torch.linalg.solve(wide.mT, wide, left=False)
        return R.to(q.dtype)
