"""Triton kernel that quantises rows to e4m3.

One program per row reads it twice: once for its largest magnitude and once, from the L2 cache, to
round.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["aot_specs", "quantize_rows"]

_BLOCK = 2048  # elements per step: 16 bytes per lane of bf16 at 8 warps
_WARPS = 8


@triton.jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, K, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Row m: scale[m] = max(max |x|, LEAST) / LARGEST, out = x / scale[m]; K elements per row."""
    row = tl.program_id(0).to(tl.int64) * K
    peaks = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + at, mask=at < K, other=0.0).to(tl.float32)
        # A NaN must stay a NaN, so that an overflow is not hidden.
        peaks = tl.maximum(peaks, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    peak = tl.max(peaks, axis=0)
    peak += tl.sum(tl.where(peaks != peaks, peaks, 0.0), axis=0)
    scale = tl.maximum(peak, LEAST, propagate_nan=tl.PropagateNan.ALL) / LARGEST
    tl.store(scale_ptr + tl.program_id(0), scale)
    factor = 1.0 / scale
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + at, mask=at < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + row + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < K)


def quantize_rows(
    x: Tensor, largest: float, least: float, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Return (x / scale in `dtype` [M, K], scale fp32 [M, 1]) of a contiguous x [M, K]."""
    M, K = x.shape
    out = torch.empty(M, K, dtype=dtype, device=x.device)
    scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    if M:
        launch(
            _quantize_rows_kernel, (M,), x, out, scale, K,
            LARGEST=largest, LEAST=least, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return out, scale


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    constexprs = {"LARGEST": 448.0, "LEAST": 1e-30, "BLOCK": _BLOCK}
    return [
        spec(
            f"quantize rows e4m3 {dtype}",
            _quantize_rows_kernel,
            [f"*{dtype}", "*fp8e4nv", "*fp32", "i32"],
            constexprs,
            num_warps=_WARPS,
            fast=dtype == "bf16",
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]
