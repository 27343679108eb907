"""A change of few entries of a weight, and places drawn for one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.site import Site
from lightning_peft.core.terms import FormedTerm

__all__ = ["Sparse", "random_places"]


def random_places(site: Site, n: int, seed: int) -> Tensor:
    """Draw n flat positions in a weight, int32, that depend only on the seed."""
    if site.device.type == "meta":
        return torch.empty(n, dtype=torch.int32, device="meta")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(site.shape.numel(), generator=generator)[:n].int()


@dataclass(frozen=True)
class Sparse(FormedTerm):
    """ΔW.flatten()[places] = values; places differ.

    Attributes:
        values: [K].
        places: [K], row by row in [out, in].
        shape: [out, in].
    """

    values: Tensor
    places: Tensor
    shape: tuple[int, int]

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        zeros = self.values.new_zeros(self.shape[0] * self.shape[1])
        return zeros.index_add(0, self.places, self.values).view(self.shape)

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """One product with W + ΔW; the gradient of `values` is gathered from dYᵀX."""
        changed = W.reshape(-1).index_add(0, self.places, self.values).view(self.shape)
        return F.linear(x, changed, b)
