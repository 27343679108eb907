"""Triton kernels for packed experts: products that decode on the fly.

Rows are sorted by expert, and only the device knows the ends of groups. A program finds its expert
by counting tiles, so nothing waits for the host and a captured graph serves any routing. A tile
holds at most BLOCK_M rows of one expert; W is read once per tile and never written to memory. Even
and odd columns are two products, which needs no interleaving.

    forward    Y[rows of e] = X[rows of e] · W[e]ᵀ      W[e] is the wide operand
    backward   dX[rows of e] = dY[rows of e] · W[e]     columns 2j and 2j + 1 side by side

Each loop spells out the decoding, as in `small_batch_triton`: in a function of its own the loads
come in another order, and tiles of 64 rows spill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.chips import chip_of, pipeline_stages, tile_rows
from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.codebooks.four_bit import code
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.nf4.block_scale_triton import block_scale
from lightning_peft_kernels.tools.aot import spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_peft_kernels.nf4.ops import Packed4bit


__all__ = ["aot_specs", "grouped_linear_4bit", "tile_of"]

_BLOCK_N, _BLOCK_K = 64, 128


@triton.jit
def tile_of(ends_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return (expert, first row, end of its rows) of a tile; expert ≥ E beyond the last tile."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (tile - upto + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _forward_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    table_ptr,
    map_ptr,
    ends_ptr,
    y_ptr,
    E,
    N,
    K,
    blocks,
    seconds,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, n] for one tile of rows and BLOCK_N outputs; program (tile, n)."""
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), E, BLOCK_M, BLOCK_E)
    if expert >= E:
        return
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // 2)
    table = tl.load(table_ptr + tl.arange(0, 16))
    width = K // 2
    packed_ptr += expert.to(tl.int64) * N * width
    absmax_ptr += expert.to(tl.int64) * blocks
    absmax2_ptr += expert * seconds
    offset_ptr += expert
    sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    SIZE: tl.constexpr = BLOCK_N * BLOCK_K // 2
    for k in range(0, K, BLOCK_K):
        column = k // 2 + byte
        here = column < width
        inside = (n < N)[:, None] & here[None, :]
        at = n[:, None] * width + column[None, :]
        bits = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
        block = at // (BLOCK_SIZE // 2)
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED)
        x = x_ptr + m[None, :].to(tl.int64) * K + 2 * column[:, None]
        taken = here[:, None] & (m < end)[None, :]
        even = tl.load(x, mask=taken, other=0.0)
        odd = tl.load(x + 1, mask=taken, other=0.0)
        high = tl.gather(table, tl.reshape(bits >> 4, (SIZE,)), 0)
        low = tl.gather(table, tl.reshape(bits & 15, (SIZE,)), 0)
        high = (tl.reshape(high, (BLOCK_N, BLOCK_K // 2)) * scale).to(even.dtype)
        low = (tl.reshape(low, (BLOCK_N, BLOCK_K // 2)) * scale).to(even.dtype)
        sum = tl.dot(high, even, sum, input_precision="ieee")
        sum = tl.dot(low, odd, sum, input_precision="ieee")
    at = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y_ptr + at, sum.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < end)[None, :])


@triton.jit
def _backward_kernel(
    dY_ptr,
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    table_ptr,
    map_ptr,
    ends_ptr,
    dX_ptr,
    E,
    N,
    K,
    blocks,
    seconds,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dX[m, k] for one tile of rows and BLOCK_K inputs; program (tile, k)."""
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), E, BLOCK_M, BLOCK_E)
    if expert >= E:
        return
    m = first + tl.arange(0, BLOCK_M)
    width = K // 2
    column = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    here = column < width
    table = tl.load(table_ptr + tl.arange(0, 16))
    packed_ptr += expert.to(tl.int64) * N * width
    absmax_ptr += expert.to(tl.int64) * blocks
    absmax2_ptr += expert * seconds
    offset_ptr += expert
    even = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    SIZE: tl.constexpr = BLOCK_N * BLOCK_K // 2
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & here[None, :]
        at = n[:, None] * width + column[None, :]
        bits = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
        block = at // (BLOCK_SIZE // 2)
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED)
        dY = tl.load(
            dY_ptr + m[:, None].to(tl.int64) * N + n[None, :],
            mask=(m < end)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        high = tl.gather(table, tl.reshape(bits >> 4, (SIZE,)), 0)
        low = tl.gather(table, tl.reshape(bits & 15, (SIZE,)), 0)
        high = (tl.reshape(high, (BLOCK_N, BLOCK_K // 2)) * scale).to(dY.dtype)
        low = (tl.reshape(low, (BLOCK_N, BLOCK_K // 2)) * scale).to(dY.dtype)
        even = tl.dot(dY, high, even, input_precision="ieee")
        odd = tl.dot(dY, low, odd, input_precision="ieee")
    both = tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K))
    at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < end)[:, None] & (at < K)[None, :]
    to = dX_ptr + m[:, None].to(tl.int64) * K + at[None, :]
    tl.store(to, both.to(dX_ptr.dtype.element_ty), mask=mask)


def grouped_linear_4bit(
    X: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    ends: Tensor,
    kind: str,
    block_size: int,
    *,
    transposed: bool,
) -> Tensor:
    """Multiply rows of X by the weight of their expert, decoded in the product.

    Args:
        X: [S, K], or dY [S, N] if not transposed; contiguous, sorted by expert.
        q: Every part with a leading expert axis; packed [E, N·K/2].
        shape: (N, K) of one expert, K even.
        ends: int32 [E], the end row of each expert.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise; blocks start with each expert.
        transposed: If True, X W[e]ᵀ [S, N]; else X W[e] [S, K].

    Returns:
        The product; rows beyond the last group are not written.
    """
    N, K = shape
    E, S, device = ends.shape[0], X.shape[0], str(X.device)
    absmax = q.absmax.reshape(E, -1)
    nested = q.absmax2 is not None
    absmax2 = absmax if q.absmax2 is None else q.absmax2.reshape(E, -1)
    out = torch.empty(S, N if transposed else K, dtype=X.dtype, device=X.device)
    if not S:
        return out
    rows = tile_rows(2 * S // E)
    tiles = S // rows + min(E, S)  # full tiles, and a ragged one per expert
    if transposed:
        kernel, columns, block_n = _forward_kernel, triton.cdiv(N, _BLOCK_N), _BLOCK_N
    else:
        kernel, columns, block_n = _backward_kernel, triton.cdiv(K, _BLOCK_K), _backward_n(rows)
    launch(
        kernel, (tiles, columns), X, q.packed, absmax, absmax2, q.offset if nested else absmax,
        code(kind, device), dynamic_map(True, device), ends, out,
        E, N, K, absmax.shape[1], absmax2.shape[1],
        BLOCK_SIZE=block_size, NESTED=nested, BLOCK_E=triton.next_power_of_2(E), BLOCK_M=rows,
        BLOCK_N=block_n, BLOCK_K=_BLOCK_K, num_warps=_warps(rows),
        num_stages=pipeline_stages(chip_of(X.device), rows),
    )  # fmt: skip
    return out


def _warps(rows: int) -> int:
    return 8 if rows == 64 else 4  # four warps spill on sm_80


def _backward_n(rows: int) -> int:
    return 64 if rows == 64 else 32  # twice as many columns spill with Triton 3.6


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    for nested in (True, False):
        what = {"BLOCK_SIZE": 64, "NESTED": nested, "BLOCK_E": 128}
        types = ["*bf16", "*u8", "*u8" if nested else "*fp32", *["*fp32"] * 4, "*i32", "*bf16"]
        for rows in (16, 32, 64):
            tile = what | {"BLOCK_M": rows, "BLOCK_K": _BLOCK_K}
            name = f"{'nested' if nested else 'plain'} {rows} rows"
            for direction, kernel, block_n, gemm in (
                ("forward", _forward_kernel, _BLOCK_N, True),
                ("backward", _backward_kernel, _backward_n(rows), rows == 64),
            ):
                specs.append(
                    spec(
                        f"experts {direction} {name}",
                        kernel,
                        [*types, *["i32"] * 5],
                        tile | {"BLOCK_N": block_n},
                        num_warps=_warps(rows),
                        gemm=gemm,
                        rows=rows,
                        fast=nested and rows == 16,
                    )
                )
    return specs
