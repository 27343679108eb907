"""Triton kernel that dequantises experts that have rows, and skips the others."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.codebooks.four_bit import code
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["aot_specs", "dequantize_active_experts"]

_WARPS, _STEPS = 4, 4


@triton.jit
def _dequantize_active_kernel(
    packed_ptr,
    scale_ptr,
    table_ptr,
    ends_ptr,
    out_ptr,
    n_words,
    words,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Decode eight weights per word, `words` words per expert; skip experts without rows."""
    start = tl.program_id(0).to(tl.int64) * (WORDS * STEPS)
    last = tl.minimum(start + WORDS * STEPS, n_words) - 1
    first, last = start // words, last // words
    before = tl.load(ends_ptr + first - 1, mask=first > 0, other=0)
    if tl.load(ends_ptr + last) == before:
        return
    lane = tl.arange(0, 8)
    shift = (lane // 2) * 8 + 4 - (lane % 2) * 4
    table = tl.load(table_ptr + tl.arange(0, 16))
    for step in tl.static_range(STEPS):
        word = start + step * WORDS + tl.arange(0, WORDS)
        inside = word < n_words
        scale = tl.load(scale_ptr + word // (BLOCK_SIZE // 8), mask=inside, other=0.0)
        bits = tl.load(packed_ptr + word, mask=inside, other=0)
        nibble = (bits[:, None] >> shift[None, :]) & 15
        value = tl.reshape(tl.gather(table, tl.reshape(nibble, (WORDS * 8,)), 0), (WORDS, 8))
        at = word[:, None] * 8 + lane[None, :]
        y = (value * scale[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=inside[:, None])


def dequantize_active_experts(
    packed: Tensor, scales: Tensor, ends: Tensor, kind: str, block_size: int, out: Tensor
) -> Tensor:
    """Dequantise experts with rows into out [E, N, K]; leave the other experts unwritten.

    Args:
        packed: uint8 [E, N·K/2], N·K a multiple of `block_size`.
        scales: fp32 [E, blocks].
        ends: int32 [E], the end row of each expert.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.
        out: [E, N, K], written and returned.
    """
    words = packed.reshape(-1).view(torch.int32)
    width = 32 * _WARPS
    launch(
        _dequantize_active_kernel, (triton.cdiv(words.numel(), width * _STEPS),),
        words, scales, code(kind, str(packed.device)), ends, out,
        words.numel(), words.numel() // ends.shape[0],
        BLOCK_SIZE=block_size, WORDS=width, STEPS=_STEPS, num_warps=_WARPS,
    )  # fmt: skip
    return out


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    step = {"BLOCK_SIZE": 64, "WORDS": 32 * _WARPS, "STEPS": _STEPS}
    types = ["*i32", "*fp32", "*fp32", "*i32", "*bf16", "i32", "i32"]
    return [spec("dequantize active experts", _dequantize_active_kernel, types, step, fast=True)]
