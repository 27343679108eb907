"""Triton kernels that multiply few rows by a packed weight, decoding it in the product.

Up to four rows, a program keeps 16 rows of W × 64 words in registers (`_gemv_kernel`). For more
rows, W is the wide operand, so that few rows of x still fill `wgmma`; even and odd columns are two
products, which needs no interleaving (`_gemm_kernel`). Both cut K into parts, written as fp32 and
added by `k_parts_triton`.
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
from lightning_peft_kernels.nf4.block_scale_triton import block_scale, scale_tensors
from lightning_peft_kernels.nf4.k_parts_triton import add_parts, cut_in_parts
from lightning_peft_kernels.nf4.selection import FEW_TOKENS
from lightning_peft_kernels.tools.aot import spec

if TYPE_CHECKING:
    from lightning_peft_kernels.nf4.ops import Packed4bit

__all__ = ["aot_specs", "decode"]

_ROWS, _WORDS = 16, 64
_BLOCK_N, _BLOCK_K = 64, 128
#: Four per multiprocessor of 132: K is cut further to reach this number.
_PROGRAMS, _MOST_PARTS = 528, 8


@triton.jit
def _value(table, nibble, ROWS: tl.constexpr, WORDS: tl.constexpr):
    flat = tl.reshape(nibble & 15, (ROWS * WORDS,))
    return tl.reshape(tl.gather(table, flat, 0), (ROWS, WORDS))


@triton.jit
def _dot8(bits, table, x0, x1, x2, x3, x4, x5, x6, x7, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Σ table[nibble j] · x_j over the eight nibbles of a word; `table` [16]."""
    sum = _value(table, bits >> 4, ROWS, WORDS) * x0
    sum += _value(table, bits, ROWS, WORDS) * x1
    sum += _value(table, bits >> 12, ROWS, WORDS) * x2
    sum += _value(table, bits >> 8, ROWS, WORDS) * x3
    sum += _value(table, bits >> 20, ROWS, WORDS) * x4
    sum += _value(table, bits >> 16, ROWS, WORDS) * x5
    sum += _value(table, bits >> 28, ROWS, WORDS) * x6
    sum += _value(table, bits >> 24, ROWS, WORDS) * x7
    return sum


@triton.jit
def _gemv_kernel(
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
    part_words,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """part[p, m, n] = Σ over the words of part p; program (n block, p, m)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part, m = tl.program_id(1), tl.program_id(2)
    words = K // 8
    first = tl.multiple_of(part * part_words, WORDS)
    last = tl.minimum(first + part_words, words)
    table = tl.load(table_ptr + tl.arange(0, 16))
    sum = tl.zeros((ROWS, WORDS), tl.float32)
    for start in range(first, last, WORDS):
        word = start + tl.arange(0, WORDS)
        here = word < last
        inside = (row < N)[:, None] & here[None, :]
        at = row[:, None].to(tl.int64) * words + word[None, :]
        bits = tl.load(packed_ptr + at, mask=inside, other=0)
        block = at // (BLOCK_SIZE // 8)
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED)
        x = x_ptr + m * K + word * 8
        x0 = tl.load(x, mask=here, other=0.0).to(tl.float32)[None, :]
        x1 = tl.load(x + 1, mask=here, other=0.0).to(tl.float32)[None, :]
        x2 = tl.load(x + 2, mask=here, other=0.0).to(tl.float32)[None, :]
        x3 = tl.load(x + 3, mask=here, other=0.0).to(tl.float32)[None, :]
        x4 = tl.load(x + 4, mask=here, other=0.0).to(tl.float32)[None, :]
        x5 = tl.load(x + 5, mask=here, other=0.0).to(tl.float32)[None, :]
        x6 = tl.load(x + 6, mask=here, other=0.0).to(tl.float32)[None, :]
        x7 = tl.load(x + 7, mask=here, other=0.0).to(tl.float32)[None, :]
        sum += scale * _dot8(bits, table, x0, x1, x2, x3, x4, x5, x6, x7, ROWS, WORDS)
    tl.store(part_ptr + (part * M + m) * N + row, tl.sum(sum, axis=1), mask=row < N)


@triton.jit
def _gemm_kernel(
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
    part_k,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """part[p, m, n] for all M ≤ BLOCK_M rows of x; a tile of W is the wide operand."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    byte = tl.arange(0, BLOCK_K // 2)
    table = tl.load(table_ptr + tl.arange(0, 16))
    first = tl.multiple_of(part * part_k, BLOCK_K)
    last = tl.minimum(first + part_k, K)
    sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    SIZE: tl.constexpr = BLOCK_N * BLOCK_K // 2
    for k in range(first, last, BLOCK_K):
        column = k // 2 + byte
        here = column < last // 2
        inside = (n < N)[:, None] & here[None, :]
        at = n[:, None].to(tl.int64) * (K // 2) + column[None, :]
        bits = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
        block = at // (BLOCK_SIZE // 2)
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED)
        x = x_ptr + m[None, :] * K + 2 * column[:, None]
        taken = here[:, None] & (m < M)[None, :]
        even = tl.load(x, mask=taken, other=0.0)
        odd = tl.load(x + 1, mask=taken, other=0.0)
        high = tl.gather(table, tl.reshape(bits >> 4, (SIZE,)), 0)
        low = tl.gather(table, tl.reshape(bits & 15, (SIZE,)), 0)
        high = (tl.reshape(high, (BLOCK_N, BLOCK_K // 2)) * scale).to(even.dtype)
        low = (tl.reshape(low, (BLOCK_N, BLOCK_K // 2)) * scale).to(even.dtype)
        sum = tl.dot(high, even, sum, input_precision="ieee")
        sum = tl.dot(low, odd, sum, input_precision="ieee")
    at = (part * M + m[None, :]) * N + n[:, None]
    tl.store(part_ptr + at, sum, mask=(n < N)[:, None] & (m < M)[None, :])


def decode(
    x: Tensor,
    q: Packed4bit,
    N: int,
    S: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    kind: str,
    block_size: int,
) -> Tensor:
    """Return y [M, N] of x [M, K], 1 ≤ M ≤ 64, K a multiple of eight; S is scaled."""
    M, K = x.shape
    x = x.contiguous()
    device, nested = str(x.device), q.absmax2 is not None
    scales = scale_tensors(q)
    tables = (code(kind, device), dynamic_map(True, device))
    what = {"BLOCK_SIZE": block_size, "NESTED": nested}
    packed = q.packed.reshape(-1)
    if M <= FEW_TOKENS:
        columns, step = triton.cdiv(N, _ROWS), _WORDS
        per_part, parts = cut_in_parts(
            K // 8, step, columns * M, programs=_PROGRAMS, most=_MOST_PARTS
        )
        part = torch.empty(parts, M, N, dtype=torch.float32, device=x.device)
        launch(
            _gemv_kernel, (columns, parts, M),
            x, packed.view(torch.int32), *scales, *tables, part, M, N, K, per_part, **what,
            ROWS=_ROWS, WORDS=_WORDS, num_warps=4,
        )  # fmt: skip
    else:
        columns = triton.cdiv(N, _BLOCK_N)
        per_part, parts = cut_in_parts(K, _BLOCK_K, columns, programs=_PROGRAMS, most=_MOST_PARTS)
        part = torch.empty(parts, M, N, dtype=torch.float32, device=x.device)
        block_m = tile_rows(M)
        launch(
            _gemm_kernel, (columns, parts),
            x, packed, *scales, *tables, part, M, N, K, per_part, **what,
            BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, num_warps=4,
            num_stages=pipeline_stages(chip_of(x.device), block_m),
        )  # fmt: skip
    return add_parts(part, x.dtype, S, B, bias)


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    for nested in (True, False):
        absmax = "*u8" if nested else "*fp32"
        scales = [absmax, *["*fp32"] * 4, "*fp32", "i32", "i32", "i32", "i32"]
        what = {"BLOCK_SIZE": 64, "NESTED": nested}
        label = "nested" if nested else "plain"
        tile = what | {"ROWS": _ROWS, "WORDS": _WORDS}
        types = ["*bf16", "*i32", *scales]
        weights = _ROWS * _WORDS * 8
        name = f"decode gemv {label}"
        specs.append(spec(name, _gemv_kernel, types, tile, fast=nested, weights=weights))
        for block_m in (16, 64):
            tile = what | {"BLOCK_M": block_m, "BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K}
            name = f"decode gemm {label} {block_m} rows"
            fast = nested and block_m == 16
            types = ["*bf16", "*u8", *scales]
            made = spec(name, _gemm_kernel, types, tile, gemm=True, rows=block_m, fast=fast)
            specs.append({**made, "weights": _BLOCK_N * _BLOCK_K})
    return specs
