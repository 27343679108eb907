"""Triton kernel that multiplies up to eight rows by a packed weight, a byte at a time.

A table of 256 entries maps a byte to its two codes in the dtype of x. The codes are the operand of
a matrix product with all rows of x at once; the scale multiplies the fp32 sums of a block. So a
weight takes half a look-up and no multiplication of its own: 3.5 to 4.0 machine instructions per
weight on sm_80 to sm_120 (`tools.sass`), whichever number of rows up to eight. Codes are rounded
to the dtype of x, as the library's product rounds weights.

K is cut into parts, written as fp32 and added by `k_parts_triton`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.codebooks.four_bit import pair_table
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.nf4.block_scale_triton import block_scale, scale_tensors
from lightning_peft_kernels.nf4.k_parts_triton import add_parts, cut_in_parts
from lightning_peft_kernels.tools.aot import spec

if TYPE_CHECKING:
    from lightning_peft_kernels.nf4.ops import Packed4bit

__all__ = ["aot_specs", "decode_pairs"]

_ROWS, _TOKENS = 128, 8  # with 64 rows x is loaded too often: 5.4 instructions per weight
_STEP = 64  # columns per turn of the loop; a block may hold several steps
_PROGRAMS, _MOST_PARTS = 528, 16  # four per multiprocessor of 132


@triton.jit
def _pairs_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    table_ptr,
    map_ptr,
    part_ptr,
    M,
    N,
    K,
    part_steps,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """part[p, m, n] for all M ≤ TOKENS rows of x; program (n block, p)."""
    HALF: tl.constexpr = STEP // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    byte, m = tl.arange(0, HALF), tl.arange(0, TOKENS)
    steps = K // STEP
    first = part * part_steps
    last = tl.minimum(first + part_steps, steps)
    table = tl.load(table_ptr + tl.arange(0, 256))
    inside, taken = row < N, (m < M)[None, :]
    wide = row.to(tl.int64)
    packed = packed_ptr + wide[:, None] * (K // 2) + byte[None, :]
    x = x_ptr + m[None, :] * K + 2 * byte[:, None]
    sum = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(first, last):
        bits = tl.load(packed + step * HALF, mask=inside[:, None], other=0).to(tl.int32)
        pairs = tl.reshape(tl.gather(table, tl.reshape(bits, (ROWS * HALF,)), 0), (ROWS, HALF))
        even = (pairs & 0xFFFF).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
        x_even = tl.load(x + step * STEP, mask=taken, other=0.0)
        x_odd = tl.load(x + step * STEP + 1, mask=taken, other=0.0)
        product = tl.dot(odd, x_odd, tl.dot(even, x_even))
        block = wide * (K // BLOCK_SIZE) + step * STEP // BLOCK_SIZE
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED)
        sum += product * scale[:, None]
    at = (part * M + m[None, :]) * N + row[:, None]
    tl.store(part_ptr + at, sum, mask=inside[:, None] & taken)


def decode_pairs(
    x: Tensor,
    q: Packed4bit,
    N: int,
    S: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    kind: str,
    block_size: int,
) -> Tensor:
    """Return y [M, N] of x [M, K] in bf16 or fp16, 1 ≤ M ≤ 8, K whole blocks."""
    M, K = x.shape
    x = x.contiguous()
    device, nested = str(x.device), q.absmax2 is not None
    step, columns = min(_STEP, block_size), triton.cdiv(N, _ROWS)
    per_part, parts = cut_in_parts(K // step, 1, columns, programs=_PROGRAMS, most=_MOST_PARTS)
    part = torch.empty(parts, M, N, dtype=torch.float32, device=x.device)
    launch(
        _pairs_kernel, (columns, parts),
        x, q.packed.reshape(-1), *scale_tensors(q), pair_table(kind, x.dtype, device),
        dynamic_map(True, device), part, M, N, K, per_part, BLOCK_SIZE=block_size, NESTED=nested,
        STEP=step, ROWS=_ROWS, TOKENS=_TOKENS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return add_parts(part, x.dtype, S, B, bias)


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time; `weights` are those of one turn of the loop."""
    specs = []
    for nested in (True, False):
        absmax = "*u8" if nested else "*fp32"
        types = ["*bf16", "*u8", absmax, "*fp32", "*fp32", "*i32", "*fp32", "*fp32", *["i32"] * 4]
        tile = {"BLOCK_SIZE": 64, "NESTED": nested, "STEP": _STEP, "ROWS": _ROWS, "TOKENS": _TOKENS}
        name = f"decode pairs {'nested' if nested else 'plain'}"
        made = spec(name, _pairs_kernel, types, tile, num_stages=2, fast=nested)
        specs.append({**made, "matrix": True, "weights": _ROWS * _STEP})
    return specs
