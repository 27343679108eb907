"""Triton kernels of a low rank per expert: the product in place, both gradients in one pass.

Rows are sorted by expert, and only the device knows the ends of groups. In forward, a program finds
the expert of its tile. In backward, a program takes all rows of one expert × some columns: dB needs
no partial sums and is zero for an expert without rows. dZ is summed over the column blocks in
order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.chips import tile_rows
from lightning_peft_kernels.experts.grouped_linear_triton import tile_of
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.lora.rank_gradients_triton import BLOCK_N, WARPS, sum_parts
from lightning_peft_kernels.tools.aot import spec

__all__ = ["add_low_rank_product_", "aot_specs", "expert_low_rank_gradients"]

_BLOCK_M, _UP_N = 64, 128


@triton.jit
def _add_product_kernel(
    Z_ptr,
    B_ptr,
    ends_ptr,
    y_ptr,
    E,
    N,
    R,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[m, n] += Σ_r Z[m, r] B[e, n, r] for one tile of rows; program (tile, n)."""
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), E, BLOCK_M, BLOCK_E)
    if expert >= E:
        return
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    z = tl.load(
        Z_ptr + m[:, None].to(tl.int64) * R + r[None, :],
        mask=(m < end)[:, None] & (r < R)[None, :],
        other=0.0,
    )
    b = tl.load(
        B_ptr + expert.to(tl.int64) * N * R + n[None, :] * R + r[:, None],
        mask=(n < N)[None, :] & (r < R)[:, None],
        other=0.0,
    )
    at = y_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m < end)[:, None] & (n < N)[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    y = tl.dot(z, b, y, input_precision="ieee")
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_kernel(
    dY_ptr,
    Z_ptr,
    B_ptr,
    ends_ptr,
    dZ_ptr,
    dB_ptr,
    S,
    N,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dZ[column block, m, r] and dB[e, n, r]; program (column block, expert)."""
    column, expert = tl.program_id(0), tl.program_id(1)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    at_B = expert.to(tl.int64) * N * R + n[:, None] * R + r[None, :]
    mask_B = (n < N)[:, None] & (r < R)[None, :]
    b = tl.load(B_ptr + at_B, mask=mask_B, other=0.0)
    dB = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        here = m < end
        at = m[:, None].to(tl.int64) * N + n[None, :]
        g = tl.load(dY_ptr + at, mask=here[:, None] & (n < N)[None, :], other=0.0)
        mask_Z = here[:, None] & (r < R)[None, :]
        at_Z = m[:, None].to(tl.int64) * R + r[None, :]
        z = tl.load(Z_ptr + at_Z, mask=mask_Z, other=0.0)
        dZ = tl.dot(g, b, input_precision="ieee")
        tl.store(dZ_ptr + column.to(tl.int64) * S * R + at_Z, dZ, mask=mask_Z)
        dB = tl.dot(tl.trans(g), z, dB, input_precision="ieee")
    tl.store(dB_ptr + at_B, dB.to(dB_ptr.dtype.element_ty), mask=mask_B)


def add_low_rank_product_(y: Tensor, Z: Tensor, B: Tensor, ends: Tensor) -> Tensor:
    """Add Z B[e]ᵀ to y [S, N] in place; Z [S, R], B [E, N, R] contiguous, R ≤ 32."""
    (S, R), (E, N) = Z.shape, B.shape[:2]
    rows = tile_rows(2 * S // E)
    tiles = S // rows + min(E, S)
    launch(
        _add_product_kernel, (tiles, triton.cdiv(N, _UP_N)),
        Z, B, ends, y, E, N, R, BLOCK_E=triton.next_power_of_2(E), BLOCK_M=rows, BLOCK_N=_UP_N,
        BLOCK_R=max(16, triton.next_power_of_2(R)), num_warps=4,
    )  # fmt: skip
    return y


def expert_low_rank_gradients(
    dY: Tensor, Z: Tensor, B: Tensor, ends: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (scaling · dY B[e] [S, R], dB [E, N, R]).

    Unassigned rows of the first are undefined.
    """
    (S, N), (E, R) = dY.shape, (B.shape[0], B.shape[2])
    block_r = max(16, triton.next_power_of_2(R))
    columns = triton.cdiv(N, BLOCK_N)
    parts = torch.empty(columns, S, R, dtype=torch.float32, device=dY.device)
    dB = torch.empty_like(B)
    launch(
        _gradients_kernel, (columns, E), dY, Z, B, ends, parts, dB, S, N, R,
        BLOCK_M=_BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=block_r, num_warps=WARPS, num_stages=2,
    )  # fmt: skip
    (dS,) = sum_parts(((parts, scaling),), dY.dtype)
    return dS, dB


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    for R in (16, 32):
        for rows in (16, 64):
            tile = {"BLOCK_E": 128, "BLOCK_M": rows, "BLOCK_N": _UP_N, "BLOCK_R": R}
            types = [*["*bf16"] * 2, "*i32", "*bf16", *["i32"] * 3]
            name = f"experts low rank r {R} {rows} rows"
            fast = R == rows == 16
            specs.append(
                spec(
                    name, _add_product_kernel, types, tile, gemm=rows == 64, rank=R, fast=fast
                )
            )  # fmt: skip
        tile = {"BLOCK_M": _BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_R": R}
        types = [*["*bf16"] * 3, "*i32", "*fp32", "*bf16", *["i32"] * 3]
        specs.append(
            spec(f"experts rank gradients r {R}", _gradients_kernel, types, tile, num_warps=WARPS,
                 num_stages=2, gemm=True, rank=R, fast=R == 16)
        )  # fmt: skip
    return specs
