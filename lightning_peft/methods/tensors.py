"""Empty tensors of a method's shapes, and their usual first values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft.core.site import Site

__all__ = ["empty_like_site", "empty_shared", "kaiming", "low_rank_pair"]


def empty_like_site(site: Site, *shape: int) -> Tensor:
    """An fp32 tensor [*batch, *shape], on meta where the site's weight is, else on the CPU.

    Adapters start on the CPU (their values then depend on the seed alone, not on the device) and
    are moved by attach.
    """
    device = "meta" if site.device.type == "meta" else "cpu"
    return torch.empty(*site.batch_shape, *shape, dtype=torch.float32, device=device)


def empty_shared(sites: Sequence[Site], *shape: int) -> Tensor:
    """An fp32 tensor that sites share, on meta where their weights are, else on the CPU."""
    device = "meta" if sites[0].device.type == "meta" else "cpu"
    return torch.empty(shape, dtype=torch.float32, device=device)


def kaiming(t: Tensor) -> Tensor:
    """Kaiming-uniform with a = √5 over rows of length in, in place: U(−1/√in, 1/√in)."""
    bound = 1 / math.sqrt(t.shape[-1])
    return torch.nn.init.uniform_(t, -bound, bound)


def low_rank_pair(site: Site, r: int) -> dict[str, Tensor]:
    """Return A [r, in] Kaiming-uniform and B [out, r] zeros: no change at the start."""
    return {
        "A": kaiming(empty_like_site(site, r, site.in_features)),
        "B": empty_like_site(site, site.out_features, r).zero_(),
    }
