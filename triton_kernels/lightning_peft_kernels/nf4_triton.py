# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Dequantising 4-bit weights in one Triton launch, nested scales included.

One int32 word (eight nibbles) a lane and step: 128-byte coalesced loads, 16-byte stores, no layout
conversion. Values come from a 16-entry table held in registers (`tl.gather`), which is portable and
runs in the interpreter. The scale is map[code] · absmax2 + offset with two roundings: compiled
without fusing the multiply and the add, or it would not be bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.codebooks import code
from lightning_peft_kernels.dynamic_map import dynamic_map

if TYPE_CHECKING:
    from lightning_peft_kernels.nf4 import Packed4bit

__all__ = ["aot_specs", "dequantize"]

_STEPS = 4  # words a lane: enough loads in flight without spilling (30 registers)
_WARPS = 4


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    table_ptr,
    map_ptr,
    out_ptr,
    n_words,
    n,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Eight weights a word; little endian, high nibble first: shifts 4, 0, 12, 8, 20, 16, 28,
    24.
    """
    lane = tl.arange(0, 8)
    shift = (lane // 2) * 8 + 4 - (lane % 2) * 4
    table = tl.load(table_ptr + tl.arange(0, 16))
    start = tl.program_id(0).to(tl.int64) * (WORDS * STEPS)
    for step in tl.static_range(STEPS):
        word = start + step * WORDS + tl.arange(0, WORDS)
        inside = word < n_words
        block = word // (BLOCK_SIZE // 8)
        if NESTED:
            c = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
            second = tl.load(absmax2_ptr + block // 256, mask=inside, other=0.0)
            scale = tl.load(map_ptr + c) * second + tl.load(offset_ptr)
        else:
            scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
        bits = tl.load(packed_ptr + word, mask=inside, other=0)
        nibble = (bits[:, None] >> shift[None, :]) & 15
        value = tl.reshape(tl.gather(table, tl.reshape(nibble, (WORDS * 8,)), 0), (WORDS, 8))
        at = word[:, None] * 8 + lane[None, :]
        y = (value * scale[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=inside[:, None] & (at < n))


def dequantize(
    q: Packed4bit,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Weights in `dtype`, into `out` where given; the bytes are padded to whole words only where n
    is no multiple of eight.
    """
    n = torch.Size(shape).numel()
    packed = q.packed.reshape(-1)
    if packed.numel() % 4:
        packed = torch.nn.functional.pad(packed, (0, -packed.numel() % 4))
    words = packed.view(torch.int32)
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    nested = q.absmax2 is not None
    device = str(packed.device)
    width = 32 * _WARPS
    grid = (triton.cdiv(words.numel(), width * _STEPS),)
    absmax = q.absmax.reshape(-1)
    extra: dict[str, Any] = {"num_warps": _WARPS, "enable_fp_fusion": False}
    if n:
        _dequantize_kernel[grid](
            words,
            absmax,
            q.absmax2 if nested else absmax,
            q.offset if nested else absmax,
            code(kind, device),
            dynamic_map(True, device),
            out,
            words.numel(),
            n,
            BLOCK_SIZE=block_size,
            NESTED=nested,
            WORDS=width,
            STEPS=_STEPS,
            **extra,
        )
    return out


def aot_specs() -> list[dict[str, Any]]:
    """What is compiled ahead of time: {name, fn, signature, constexprs, attrs, num_warps,
    num_stages, options}.
    """
    specs = []
    for nested in (True, False):
        for dtype in ("bf16", "fp16", "fp32"):
            signature = {
                "packed_ptr": "*i32",
                "absmax_ptr": "*u8" if nested else "*fp32",
                "absmax2_ptr": "*fp32",
                "offset_ptr": "*fp32",
                "table_ptr": "*fp32",
                "map_ptr": "*fp32",
                "out_ptr": f"*{dtype}",
                "n_words": "i32",
                "n": "i32",
            }
            constexprs = {
                "BLOCK_SIZE": 64,
                "NESTED": nested,
                "WORDS": 32 * _WARPS,
                "STEPS": _STEPS,
            }
            specs.append(
                {
                    "name": f"dequantize_4bit {'nested' if nested else 'plain'} {dtype}",
                    "fn": _dequantize_kernel,
                    "signature": signature | dict.fromkeys(constexprs, "constexpr"),
                    "constexprs": constexprs,
                    "attrs": {(i,): [["tt.divisibility", 16]] for i in range(9)},
                    "num_warps": _WARPS,
                    "num_stages": 3,
                    "options": {"enable_fp_fusion": False},
                    "fast": nested and dtype == "bf16",
                }
            )
    return specs
