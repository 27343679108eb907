"""Triton kernel for dS and dB of a low-rank branch: one pass over dY.

A program takes some rows × 256 columns. It writes partial sums in fp32, which a second kernel adds
in order, so runs repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["BLOCK_N", "WARPS", "aot_specs", "low_rank_gradients", "sum_parts"]

_BLOCK_M = 64
_ROWS = 1024  # rows per program: fewer mean more parts of dB
BLOCK_N, WARPS = 256, 8  # fewer columns mean more parts of dS
_PROGRAMS = 264  # two per multiprocessor of 132: rows are cut further to reach this number


@triton.jit
def _gradients_kernel(
    dY_ptr,
    S_ptr,
    B_ptr,
    dS_ptr,
    dB_ptr,
    M,
    N,
    R,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dS[column block, m, r] and dB[part, n, r]; program (column block, part of the rows)."""
    column, part = tl.program_id(0), tl.program_id(1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    at_B = n[:, None] * R + r[None, :]
    mask_B = (n < N)[:, None] & (r < R)[None, :]
    b = tl.load(B_ptr + at_B, mask=mask_B, other=0.0)
    dB = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for step in range(0, rows, BLOCK_M):
        m = part * rows + step + tl.arange(0, BLOCK_M)
        here = m < M
        inside = here[:, None] & (n < N)[None, :]
        at = m[:, None].to(tl.int64) * N + n[None, :]
        g = tl.load(dY_ptr + at, mask=inside, other=0.0)
        mask_S = here[:, None] & (r < R)[None, :]
        at_S = m[:, None] * R + r[None, :]
        s = tl.load(S_ptr + at_S, mask=mask_S, other=0.0)
        dS = tl.dot(g, b, input_precision="ieee")
        tl.store(dS_ptr + column.to(tl.int64) * M * R + at_S, dS, mask=mask_S)
        dB = tl.dot(tl.trans(g), s, dB, input_precision="ieee")
    tl.store(dB_ptr + part.to(tl.int64) * N * R + at_B, dB, mask=mask_B)


@triton.jit
def _sum_kernel(part_ptr, out_ptr, parts, size, scaling, BLOCK: tl.constexpr):
    """out[i] = scaling · Σ_p part[p, i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    sum = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        sum += tl.load(part_ptr + i, mask=inside, other=0.0)
        part_ptr += size  # parts · size may exceed 31 bits
    tl.store(out_ptr + i, (sum * scaling).to(out_ptr.dtype.element_ty), mask=inside)


def low_rank_gradients(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (scaling · dY B [M, R], dYᵀ S [N, R]) of contiguous tensors; R ≤ 32."""
    (M, N), R = dY.shape, B.shape[1]
    block_r = max(16, triton.next_power_of_2(R))
    columns = triton.cdiv(N, BLOCK_N)
    rows = max(_BLOCK_M, min(_ROWS, triton.cdiv(M * columns, _PROGRAMS)))
    rows = triton.cdiv(rows, _BLOCK_M) * _BLOCK_M
    parts = triton.cdiv(M, rows)
    dS_parts = torch.empty(columns, M, R, dtype=torch.float32, device=dY.device)
    dB_parts = torch.empty(parts, N, R, dtype=torch.float32, device=dY.device)
    launch(
        _gradients_kernel, (columns, parts),
        dY, S, B, dS_parts, dB_parts, M, N, R, rows,
        BLOCK_M=_BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=block_r, num_warps=WARPS, num_stages=2,
    )  # fmt: skip
    dS, dB = sum_parts(((dS_parts, scaling), (dB_parts, 1.0)), dY.dtype)
    return dS, dB


def sum_parts(parts: Sequence[tuple[Tensor, float]], dtype: torch.dtype) -> list[Tensor]:
    """Sum the leading axis of each tensor in order and multiply by its factor."""
    sums = []
    for part, factor in parts:
        out = torch.empty(part.shape[1:], dtype=dtype, device=part.device)
        size = out.numel()
        launch(
            _sum_kernel, (-(-size // 1024),), part, out, len(part), size, factor,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
        sums.append(out)
    return sums


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    types = [*["*bf16"] * 3, *["*fp32"] * 2, *["i32"] * 4]
    for R in (16, 32):
        tile = {"BLOCK_M": _BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_R": R}
        name = f"rank gradients r {R}"
        specs.append(
            spec(name, _gradients_kernel, types, tile, num_warps=WARPS, num_stages=2, gemm=True,
                 rank=R, fast=R == 16, weights=_BLOCK_M * BLOCK_N)
        )  # fmt: skip
    types = ["*fp32", "*bf16", "i32", "i32", "fp32"]
    specs.append(spec("rank gradients sum", _sum_kernel, types, {"BLOCK": 1024}, fast=True))
    return specs
