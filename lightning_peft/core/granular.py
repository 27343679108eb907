"""Low-rank changes of each block of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, Term

__all__ = ["Granular"]


@dataclass(frozen=True)
class Granular(Term):
    """Block (j, n) of ΔW = s (A_n[:, slice j] B_j[slice n])ᵀ, slices of r/k.

    Attributes:
        A: [k, in/k, r].
        B: [k, r, out/k].
        scaling: s.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        k, width, r = self.A.shape
        A = self.A.view(k, width, k, r // k)
        B = self.B.view(k, k, r // k, -1)
        blocks = torch.einsum("nijq,jnqo->joni", A, B)
        return self.scaling * blocks.reshape(-1, k * width)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two batched products with a permutation between."""
        if not ops.features_last:
            return Dense(self.matrix()).apply(ops, site, x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        k, width, r = self.A.shape
        h = torch.bmm(x.reshape(-1, k, width).transpose(0, 1), self.A)  # [n, M, (j, q)]
        M = h.shape[1]
        h = h.view(k, M, k, r // k).permute(2, 1, 0, 3).reshape(k, M, r)  # [j, M, (n, q)]
        y = torch.bmm(h * self.scaling, self.B).transpose(0, 1)
        return y.reshape(*x.shape[:-1], y.shape[-2] * y.shape[-1])
