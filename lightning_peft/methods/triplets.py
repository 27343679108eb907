"""Leading singular triplets of a weight, and methods that keep them as frozen factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import FromWeight
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["FrozenTriplets", "leading_triplets"]


def leading_triplets(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [*, out, r], S [*, r] and Vᵀ [*, r, in] of the r largest singular values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[..., :r], S[..., :r], Vh[..., :r, :]


class FrozenTriplets(FromWeight):
    """Base of methods whose A and B are frozen factors of the weight; `rank` says how many."""

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """A [r, in], B [out, r], filled from the weight."""
        r = self.rank(site)
        return {
            "A": empty_like_site(site, r, site.in_features).zero_(),
            "B": empty_like_site(site, site.out_features, r).zero_(),
        }
