"""Triton kernel of dropout by seed.

Four elements share one Philox counter, so one set of ten rounds serves four elements and the pass
stays bound by memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["aot_specs", "dropout", "dropout_kernel"]

_COUNTERS = 256  # counters per program: 1,024 elements


@triton.jit
def dropout_kernel(x_ptr, y_ptr, seed_ptr, n, p, scale, COUNTERS: tl.constexpr):
    """y = x · [u ≥ p] · scale for 4 · COUNTERS elements per program."""
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    seed = tl.load(seed_ptr)
    a, b, c, d = tl.rand4x(seed, first + tl.arange(0, COUNTERS))
    u = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * COUNTERS,))
    at = first * 4 + tl.arange(0, 4 * COUNTERS)
    inside = at < n
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # A product keeps NaN and infinity visible.
    y = x * tl.where(u >= p, 1.0, 0.0) * scale
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Compute `seeded_dropout` of a contiguous x."""
    y = torch.empty_like(x)
    n = x.numel()
    if n:
        grid = (triton.cdiv(n, 4 * _COUNTERS),)
        launch(
            dropout_kernel, grid, x, y, seed, n, p, 1.0 / (1.0 - p), COUNTERS=_COUNTERS, num_warps=4
        )
    return y


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time: bf16 and fp32."""
    return [
        spec(
            f"dropout_{kind}",
            dropout_kernel,
            [f"*{kind}", f"*{kind}", "*i64", "i32", "fp32", "fp32"],
            {"COUNTERS": _COUNTERS},
            num_stages=1,
            fast=kind == "bf16",
        )
        for kind in ("bf16", "fp32")
    ]
