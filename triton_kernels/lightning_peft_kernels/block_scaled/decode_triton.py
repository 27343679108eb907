"""Triton kernel that decodes block-scaled weights, one launch for a matrix or a stack of experts.

Codes are turned into fp32 by their bits, without the chip's FP8 conversions, so that every chip and
the interpreter compute the same values. Reads 1 or ½ byte per weight, writes once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lightning_peft_kernels.block_scaled.layout import BlockLayout
from lightning_peft_kernels.launch import launch
from lightning_peft_kernels.tools.aot import spec

__all__ = ["aot_specs", "decode"]

_ROWS, _COLUMNS = 8, 256  # 16 weights per lane at 4 warps


@triton.jit
def _value(code, ELEMENT: tl.constexpr):
    """fp32 value of int32 codes."""
    if ELEMENT == "e4m3":
        mantissa, exponent = code & 7, (code >> 3) & 15
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
        value = tl.where((code >> 7) & 1 == 1, -magnitude, magnitude)
    elif ELEMENT == "e2m1":
        mantissa, exponent = code & 1, (code >> 1) & 3
        normal = (((exponent + 126) << 23) | (mantissa << 22)).to(tl.float32, bitcast=True)
        magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.5, normal)
        value = tl.where((code >> 3) & 1 == 1, -magnitude, magnitude)
    elif ELEMENT == "int8":
        value = tl.where(code > 127, code - 256, code).to(tl.float32)
    elif ELEMENT == "int4":
        value = (code - 8).to(tl.float32)
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def _decode_kernel(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N,
    K,
    row_bytes,
    grid_k,
    block_n,
    block_k,
    half_n,
    half_grid,
    ELEMENT: tl.constexpr,
    TWO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [N, K] of the expert that the third program axis counts; all tensors contiguous."""
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (k < K)[None, :]
    row = expert * N + n
    if TWO:
        byte = tl.load(
            codes_ptr + row[:, None] * row_bytes + (k // 2)[None, :], mask=inside, other=0
        ).to(tl.int32)
        code = (byte >> ((k % 2) * 4)[None, :]) & 15
    else:
        code = tl.load(codes_ptr + row[:, None] * row_bytes + k[None, :], mask=inside, other=0).to(
            tl.int32
        )
    value = _value(code, ELEMENT)
    half = n // half_n
    block = half * half_grid + (n - half * half_n) // block_n
    grid_n = ((N + half_n - 1) // half_n) * half_grid
    at = (expert * grid_n + block)[:, None] * grid_k + (k // block_k)[None, :]
    if HAS_ZEROS:
        value -= tl.load(zeros_ptr + at, mask=inside, other=0.0)
    y = value * tl.load(scales_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row[:, None] * K + k[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


def decode(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: BlockLayout, out: Tensor
) -> Tensor:
    """Decode into a contiguous out [*, N, K].

    Args:
        codes: uint8 [*, N, bytes].
        scales: fp32 [*, blocks along N, blocks along K].
        zeros: fp32, as `scales`; None for symmetric codes.
        layout: Meaning of the codes.
        out: Result.
    """
    N, K = out.shape[-2:]
    experts = out.numel() // max(1, N * K)
    rows, columns = layout.block(N, K)
    codes, scales = codes.contiguous(), scales.contiguous()
    grid = (triton.cdiv(K, _COLUMNS), triton.cdiv(N, _ROWS), experts)
    if out.numel():
        launch(
            _decode_kernel, grid, codes, scales, scales if zeros is None else zeros.contiguous(),
            out, N, K, codes.shape[-1], scales.shape[-1], rows, columns, N // layout.halves,
            scales.shape[-2] // layout.halves, ELEMENT=layout.element,
            TWO=layout.codes_per_byte == 2, HAS_ZEROS=zeros is not None, ROWS=_ROWS,
            COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


def aot_specs() -> list[dict[str, Any]]:
    """Configurations to compile ahead of time."""
    specs = []
    for element in ("e4m3", "e2m1", "int8", "int4", "uint4"):
        for dtype in ("bf16", "fp16", "fp32"):
            fast = dtype == "bf16" and element in ("e4m3", "e2m1")
            constexprs: dict[str, Any] = {
                "ELEMENT": element,
                "TWO": element not in ("e4m3", "int8"),
                "HAS_ZEROS": element == "uint4",
                "ROWS": _ROWS,
                "COLUMNS": _COLUMNS,
            }
            types = ["*u8", "*fp32", "*fp32", f"*{dtype}", *["i32"] * 8]
            name = f"decode {element} {dtype}"
            specs.append(spec(name, _decode_kernel, types, constexprs, fast=fast))
    return specs
