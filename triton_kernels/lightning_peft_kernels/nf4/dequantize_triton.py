"""Triton kernels that dequantise 4-bit weights in one launch, in either orientation.

Each lane and step takes one int32 word (eight nibbles): 128-byte coalesced loads, 16-byte stores,
no layout conversion. Values come from a 16-entry table held in registers (`tl.gather`), which is
portable and runs in the interpreter. The scale map[code] · absmax2 + offset has two roundings;
compilation must not fuse the multiply and the add, which would not be bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.codebooks.four_bit import code
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.nf4.block_scale_triton import block_scale
from lightning_peft_kernels.tools.aot import spec

if TYPE_CHECKING:
    from lightning_peft_kernels.nf4.ops import Packed4bit

__all__ = ["aot_specs", "dequantize"]

_STEPS = 4  # words per lane: enough loads in flight without spilling (30 registers)
_WARPS = 4
_ROWS, _COLUMN_WORDS = 64, 8  # tile of the transposed form: 64 × 64 weights


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    table_ptr,
    map_ptr,
    factor_ptr,
    out_ptr,
    n_words,
    n,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Decode eight weights per word: little endian, high nibble first.

    The shifts are 4, 0, 12, 8, 20, 16, 28, 24.
    """
    lane = tl.arange(0, 8)
    shift = (lane // 2) * 8 + 4 - (lane % 2) * 4
    table = tl.load(table_ptr + tl.arange(0, 16))
    start = tl.program_id(0).to(tl.int64) * (WORDS * STEPS)
    for step in tl.static_range(STEPS):
        word = start + step * WORDS + tl.arange(0, WORDS)
        inside = word < n_words
        block = word // (BLOCK_SIZE // 8)
        scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED)
        bits = tl.load(packed_ptr + word, mask=inside, other=0)
        nibble = (bits[:, None] >> shift[None, :]) & 15
        value = tl.reshape(tl.gather(table, tl.reshape(nibble, (WORDS * 8,)), 0), (WORDS, 8))
        at = word[:, None] * 8 + lane[None, :]
        y = value * scale[:, None]
        if SCALED:
            y = y * tl.load(factor_ptr)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (at < n))


@triton.jit
def _dequantize_transposed_kernel(
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    table_ptr,
    map_ptr,
    factor_ptr,
    out_ptr,
    N,
    K,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Decode W [N, K], K a multiple of eight, into out [K, N].

    A program transposes a tile of ROWS × 8·WORDS weights on chip.
    """
    lane = tl.arange(0, 8)
    shift = (lane // 2) * 8 + 4 - (lane % 2) * 4
    table = tl.load(table_ptr + tl.arange(0, 16))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (row < N)[:, None] & (column < K // 8)[None, :]
    word = row[:, None].to(tl.int64) * (K // 8) + column[None, :]
    block = word // (BLOCK_SIZE // 8)
    scale = block_scale(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, block, inside, NESTED)
    bits = tl.load(packed_ptr + word, mask=inside, other=0)
    nibble = (bits[:, :, None] >> shift[None, None, :]) & 15
    value = tl.gather(table, tl.reshape(nibble, (ROWS * WORDS * 8,)), 0)
    y = tl.reshape(value, (ROWS, WORDS, 8)) * scale[:, :, None]
    if SCALED:
        y = y * tl.load(factor_ptr)
    tile = tl.trans(tl.reshape(y.to(out_ptr.dtype.element_ty), (ROWS, WORDS * 8)))
    k = tl.program_id(1) * WORDS * 8 + tl.arange(0, WORDS * 8)
    at = k[:, None].to(tl.int64) * N + row[None, :]
    tl.store(out_ptr + at, tile, mask=(k < K)[:, None] & (row < N)[None, :])


def dequantize(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return weights in `dtype`, multiplied by `factor` [1] if given, written to `out` if given.

    A transposed result is [K, N]. The bytes are padded to full words only if n is not a multiple of
    eight.
    """
    n = torch.Size(shape).numel()
    packed = q.packed.reshape(-1)
    if packed.numel() % 4:
        packed = torch.nn.functional.pad(packed, (0, -packed.numel() % 4))
    words = packed.view(torch.int32)
    if out is None:
        size = (shape[1], shape[0]) if transposed else tuple(shape)
        out = torch.empty(size, dtype=dtype, device=packed.device)
    if not n:
        return out
    absmax = q.absmax.reshape(-1)
    nested, device = q.absmax2 is not None, str(packed.device)
    pointers = (
        words,
        absmax,
        q.absmax2 if nested else absmax,
        q.offset if nested else absmax,
        code(kind, device),
        dynamic_map(True, device),
        absmax if factor is None else factor,
        out,
    )
    extra: dict[str, Any] = {"num_warps": _WARPS, "enable_fp_fusion": False}
    what = {"BLOCK_SIZE": block_size, "NESTED": nested, "SCALED": factor is not None}
    if transposed:
        N, K = shape
        grid2 = (triton.cdiv(N, _ROWS), triton.cdiv(K, 8 * _COLUMN_WORDS))
        launch(
            _dequantize_transposed_kernel, grid2, *pointers, N, K,
            **what, ROWS=_ROWS, WORDS=_COLUMN_WORDS, **extra,
        )  # fmt: skip
        return out
    width = 32 * _WARPS
    grid = (triton.cdiv(words.numel(), width * _STEPS),)
    launch(
        _dequantize_kernel, grid, *pointers, words.numel(), n,
        **what, WORDS=width, STEPS=_STEPS, **extra,
    )  # fmt: skip
    return out


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    plain = {"enable_fp_fusion": False}
    for nested in (True, False):
        for dtype in ("bf16", "fp16", "fp32", "fp8e4nv"):
            types = ["*i32", "*u8" if nested else "*fp32", *["*fp32"] * 5, f"*{dtype}"]
            what = {"BLOCK_SIZE": 64, "NESTED": nested, "SCALED": dtype == "fp8e4nv"}
            name = f"{'nested' if nested else 'plain'} {dtype}"
            more: dict[str, Any] = {
                "options": plain,
                "num_warps": _WARPS,
            }
            rows = what | {"WORDS": 32 * _WARPS, "STEPS": _STEPS}
            fast: dict[str, Any] = {"fast": nested and dtype == "bf16"}
            if dtype == "bf16":
                fast |= {"weights": 32 * _WARPS * _STEPS * 8}
            specs.append(
                spec(f"dequantize {name}", _dequantize_kernel, [*types, "i32", "i32"], rows)
                | more
                | fast
            )
            if dtype in ("bf16", "fp8e4nv"):
                tile = what | {"ROWS": _ROWS, "WORDS": _COLUMN_WORDS}
                kernel = _dequantize_transposed_kernel
                fast = {"fast": nested and dtype == "fp8e4nv"}
                specs.append(
                    spec(f"dequantize transposed {name}", kernel, [*types, "i32", "i32"], tile)
                    | more
                    | fast
                )
    return specs
