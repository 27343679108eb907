"""Triton kernels that quantise to NF4, with the bytes of bitsandbytes on the same device.

A program takes full blocks: absmax, reciprocal, fifteen comparisons, two codes per byte. A second
kernel quantises the scales, 256 per block, with the 8-bit dynamic map. The CUDA code of
bitsandbytes multiplies every block by a bare hardware reciprocal (`rcp.approx.ftz.f32`). Its CPU
code multiplies by the IEEE reciprocal, and divides in a partial block. `APPROX` selects the
hardware form, which the interpreter cannot run. Bytes moved for n bf16 weights: 2 n read, 0.516 n
written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.codebooks.four_bit import midpoints
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["aot_specs", "quantize"]

_ELEMENTS = 4096  # per program: 8 elements per lane and step at 4 warps
_TINY = tl.constexpr(1e-38)


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _quantize_kernel(
    w_ptr,
    mids_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Quantise BLOCKS blocks per program; an element beyond n counts as zero, which packs as 7."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(w_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), axis=1)
    if APPROX:
        x = w * _reciprocal(absmax)[:, None]
    else:
        least = tl.maximum(absmax, tl.full((BLOCKS,), _TINY, tl.float32))
        partial = (block + 1) * BLOCK_SIZE > n
        one = tl.full((BLOCKS,), 1.0, tl.float32)
        divisor = tl.broadcast_to(least[:, None], (BLOCKS, BLOCK_SIZE))
        product = w * tl.div_rn(one, least)[:, None]
        x = tl.where(partial[:, None], tl.div_rn(w, divisor), product)
        absmax = tl.where(partial, least, absmax)
    code = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for i in tl.static_range(15):
        code += (x > tl.load(mids_ptr + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed_ptr + byte, (high * 16 + low).to(tl.uint8), mask=byte < (n + 1) // 2)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < n)


@triton.jit
def _quantize_scales_kernel(
    absmax_ptr,
    offset_ptr,
    map_ptr,
    codes_ptr,
    absmax2_ptr,
    n,
    APPROX: tl.constexpr,
):
    """Quantise 256 scales per program by the search of bitsandbytes on CUDA.

    Seven steps of a binary search, then one midpoint.
    """
    b = tl.program_id(0)
    at = b * 256 + tl.arange(0, 256)
    inside = at < n
    x = tl.load(absmax_ptr + at, mask=inside, other=0.0) - tl.load(offset_ptr)
    x = tl.where(inside, x, 0.0)
    peak = tl.max(tl.abs(x), axis=0)
    tl.store(absmax2_ptr + b, peak)
    if APPROX:
        x = x * _reciprocal(peak)
    else:
        x = x * tl.div_rn(tl.full((256,), 1.0, tl.float32), tl.zeros((256,), tl.float32) + peak)
    pivot = tl.full((256,), 127, tl.int32)
    below = tl.zeros((256,), tl.int32)
    above = tl.full((256,), 255, tl.int32)
    for i in tl.static_range(7):
        up = x > tl.load(map_ptr + pivot)
        below = tl.where(up, pivot, below)
        above = tl.where(up, above, pivot)
        pivot = tl.where(up, pivot + (64 >> i), pivot - (64 >> i))
    value = tl.load(map_ptr + pivot)
    upper = (tl.load(map_ptr + above) + value) * 0.5
    lower = (tl.load(map_ptr + below) + value) * 0.5
    high = tl.where(x > upper, above, pivot)
    low = tl.where(x < lower, below, pivot)
    tl.store(codes_ptr + at, tl.where(x > value, high, low).to(tl.uint8), mask=inside)


def quantize(
    W: Tensor, block_size: int, double_quant: bool, *, approx: bool | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (packed, absmax, absmax2, offset) of a tensor of any shape.

    One launch; nested scales take a second one, and torch's own mean.
    """
    flat = W.detach().reshape(-1).contiguous()  # a flat view may have gaps
    n, device = flat.numel(), flat.device
    approx = device.type == "cuda" and torch.version.hip is None if approx is None else approx
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    blocks = -(-n // block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    per_program = max(_ELEMENTS // block_size, 1)
    extra: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    if n:
        launch(
            _quantize_kernel,
            (triton.cdiv(blocks, per_program),),
            flat,
            midpoints("nf4", str(device)),
            packed,
            absmax,
            n,
            BLOCK_SIZE=block_size,
            BLOCKS=per_program,
            APPROX=approx,
            **extra,
        )
    if not double_quant:
        return packed, absmax, None, None
    offset = absmax.mean().reshape(1)
    codes = torch.empty(blocks, dtype=torch.uint8, device=device)
    absmax2 = torch.empty(-(-blocks // 256), dtype=torch.float32, device=device)
    if n:
        launch(
            _quantize_scales_kernel,
            (absmax2.numel(),),
            absmax,
            offset,
            dynamic_map(True, str(device)),
            codes,
            absmax2,
            blocks,
            APPROX=approx,
            **extra,
        )
    return packed, codes, absmax2, offset


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    plain: dict[str, Any] = {"options": {"enable_fp_fusion": False}}
    specs = []
    for approx in (True, False):
        form = "hardware" if approx else "IEEE"
        more: dict[str, Any] = plain | {"only": "cuda" if approx else "hip", "fast": approx}
        for block_size in (64, 4096):
            blocks = max(_ELEMENTS // block_size, 1)
            constexprs = {"BLOCK_SIZE": block_size, "BLOCKS": blocks, "APPROX": approx}
            types = ["*bf16", "*fp32", "*u8", "*fp32", "i32"]
            name = f"quantize_nf4 block {block_size} {form} reciprocal"
            fast = more | {"fast": approx and block_size == 64}
            specs.append(spec(name, _quantize_kernel, types, constexprs, **fast))
        types = ["*fp32", "*fp32", "*fp32", "*u8", "*fp32", "i32"]
        name = f"quantize_nf4 scales {form} reciprocal"
        specs.append(spec(name, _quantize_scales_kernel, types, {"APPROX": approx}, **more))
    return specs
