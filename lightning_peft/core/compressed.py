"""A low-rank change that keeps a compressed input for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.input_dtype import to_adapter_dtype
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, Term

__all__ = ["Compressed"]


@dataclass(frozen=True)
class Compressed(Term):
    """A low-rank change that keeps only c [n, groups] for backward, in place of x [n, in].

    Each row of x is cut into groups of length d; c is their product with v [d], and dA is formed
    with scale · c ⊗ v in place of x. The output and the gradient of x are exact.

    Attributes:
        low_rank: The change.
        v: Unit vector, or zeros where the first batch sets it.
        groups: Number of groups.
        scale: Factor on what is put in place of x.
        direction: As in `VeLoRA`.
    """

    low_rank: LowRank
    v: Tensor
    groups: int
    scale: float
    direction: str

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        return self.low_rank.matrix()

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products; the first has no part in the gradient of A."""
        A, B = self.low_rank.A, self.low_rank.B
        x = to_adapter_dtype(x, A)
        padding = self.groups * len(self.v) - x.shape[-1]
        with torch.no_grad():
            parts = F.pad(x, (0, padding)).unflatten(-1, (self.groups, len(self.v)))
            v = self._vector(parts).to(parts.dtype)
            c = parts @ v
        folded = F.pad(A, (0, padding)).unflatten(-1, (self.groups, len(v))) @ v.to(A.dtype)
        u = self.scale * F.linear(c, folded)
        h = F.linear(x, A.detach()) + (u - u.detach())  # adds zero: a gradient and no value
        return F.linear(h * self.low_rank.scaling, B)

    def _vector(self, parts: Tensor) -> Tensor:
        if self.direction == "random" or not parts.numel():  # no rows have no mean
            return self.v
        mean = parts.float().flatten(0, -2).mean(dim=0)
        mean = torch.where(mean.any(), mean, torch.ones_like(mean))
        mean = mean / torch.linalg.vector_norm(mean)
        if self.direction == "batch_average_once":
            mean = torch.where(self.v.any(), self.v.float(), mean)
            self.v.copy_(mean)
        return mean
