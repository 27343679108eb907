"""Butterfly-permuted stages of block rotations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["butterfly", "with_identities"]


def butterfly(n: int, blocks: int, size: int) -> Tensor:
    """Order [n] of one stage: within each of `blocks` stretches, groups of `size` elements are
    taken even ones first, then odd ones.
    """
    groups = torch.arange(n).view(blocks, -1, size)
    return torch.cat([groups[:, 0::2], groups[:, 1::2]], dim=1).reshape(-1)


def with_identities(blocks: Tensor, share: float) -> Tensor:
    """Put the identity in place of a share of one stage's blocks [stages, number, b, b]."""
    m, number, size, _ = blocks.shape
    drop = torch.zeros(m, number, 1, 1, device=blocks.device, dtype=blocks.dtype)
    order = torch.randperm(number, device=blocks.device)[: int(share * number)]
    drop[torch.randint(0, m, ()), order] = 1.0
    eye = torch.eye(size, device=blocks.device, dtype=blocks.dtype)
    return (1 - drop) * blocks + drop * eye
