"""The dtype in which an adapter reads its input."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_adapter_dtype"]


def to_adapter_dtype(x: Tensor, like: Tensor) -> Tensor:
    """The one dtype rule: autocast's dtype where it is on, else the adapter's; ids stay ids."""
    if (
        x.dtype == like.dtype
        or not x.is_floating_point()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return x
    return x.to(like.dtype)
