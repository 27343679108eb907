"""Scales of 4-bit blocks, as every kernel that decodes packed weights reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from lightning_peft_kernels.nf4.ops import Packed4bit

__all__ = ["block_scale", "scale_tensors"]


@triton.jit
def block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED: tl.constexpr):
    """Return the scales of these blocks in fp32, decoded if nested."""
    if NESTED:
        c = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        second = tl.load(absmax2_ptr + block // 256, mask=inside, other=0.0)
        scale = tl.load(map_ptr + c) * second + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    return scale


def scale_tensors(q: Packed4bit) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `block_scale` reads; the latter two stand for nothing if scales are plain."""
    absmax = q.absmax.reshape(-1)
    if q.absmax2 is None or q.offset is None:
        return absmax, absmax, absmax
    return absmax, q.absmax2, q.offset
