"""Scales of 4-bit blocks, as every kernel that decodes packed weights reads them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["block_scale"]


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
