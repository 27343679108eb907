"""What the autograd functions share: rows of the last axis in and out, autocast off around them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_off", "flat", "unflat"]


def autocast_off(device: str) -> AbstractContextManager[None]:
    """What was cast before stays so; costs nothing where autocast is off already."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def flat(x: Tensor) -> Tensor:
    """Rows of the last axis: [..., K] → [M, K]."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def unflat(y: Tensor, like: Tensor) -> Tensor:
    """[M, N] → [..., N] with the leading axes of `like`; no view: the caller may go on in place."""
    if like.ndim == 2:
        return y
    unviewed: Tensor = torch.ops.aten._unsafe_view(y, (*like.shape[:-1], y.shape[-1]))
    return unviewed
