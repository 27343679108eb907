"""Whether a tensor holds NaN or infinity, in any dtype."""

from __future__ import annotations

import cmath

import torch
from torch import Tensor, nn

__all__ = ["is_finite"]


def is_finite(value: Tensor) -> bool:
    """Whether all values are finite. Integer, empty and meta tensors count as finite."""
    if value.device.type == "meta" or not (value.is_floating_point() or value.is_complex()):
        return True
    # torch has no isfinite for float8.
    wide = value.float() if value.dtype.itemsize == 1 else value
    wide = wide.flatten() if wide.ndim > 16 else wide  # torch computes on at most 64 axes
    # A sum is cheaper and holds NaN or infinity if a value does. It may also overflow, and that of
    # a sharded tensor would have to be gathered.
    if type(wide) in (Tensor, nn.Parameter) and cmath.isfinite(wide.detach().sum().item()):
        return True
    return bool(torch.isfinite(wide).all())
