"""Products in e4m3: which a chip has, how operands become e4m3, and the product itself.

A weight has one scale per tensor, a row of x one per row. Where a product takes no scale per row,
rows are scaled afterwards. A chip without e4m3 products multiplies the same values in the dtype of
x, which holds them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import PLAIN_TYPES
from lightning_peft_kernels.chips import chip_of
from lightning_peft_kernels.dispatch import Backend, Decision, current_backend, launches
from lightning_peft_kernels.launch import LaunchError, note_refusal
from lightning_peft_kernels.nf4.ops import dequantize_4bit
from lightning_peft_kernels.nf4.packed import Packed4bit
from lightning_peft_kernels.nf4.reference import block_scales
from lightning_peft_kernels.registration import define_op

__all__ = [
    "dequantize_e4m3",
    "e4m3_scale",
    "quantize_rows_e4m3",
    "scaled_mm",
    "select_fp8",
]

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_LEAST = 1e-30  # scale of a row of zeros, so that 0 / scale is 0
_SHIFT = 2.0**-8


def select_fp8(shape: Sequence[int], device: torch.device) -> Decision:
    """Select how a base of this shape is multiplied; ``"dequantize"`` if e4m3 does not fit."""
    if len(shape) != 2 or shape[0] % 16 or shape[1] % 16:
        return Decision("dequantize", f"e4m3 products need multiples of 16, got {tuple(shape)}")
    chip = chip_of(device)
    if chip is None:
        why = f"no e4m3 products on {device.type}"
        return Decision("emulated", f"{why}: multiplied in the dtype of x")
    if chip.no_e4m3:
        return Decision("emulated", f"{chip.name}: {chip.no_e4m3}: multiplied in the dtype of x")
    if chip.no_row_scales:
        return Decision("scaled_rows", f"{chip.name}: {chip.no_row_scales}: rows scaled afterwards")
    return Decision("scaled_mm", "e4m3 products of the chip")


def e4m3_scale(q: Packed4bit) -> Tensor:
    """Return s_W fp32 [1] of one weight."""
    return block_scales(q).abs().amax().clamp_min(_LEAST).div(_LARGEST).reshape(1)


def _dequantize_e4m3(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    scale: Tensor,
    shape: Sequence[int],
    transposed: bool,
    kind: str,
    block_size: int,
    backend: Backend = "auto",
) -> Tensor:
    q, factor = Packed4bit(packed, absmax, absmax2, offset), 1.0 / scale
    op, device, dtype = "dequantize_e4m3", packed.device, torch.bfloat16
    chip = chip_of(device)
    # Without e4m3 kernels torch's own conversion still works.
    if (chip is None or not chip.no_e4m3) and launches(op, device, dtype, backend):
        from lightning_peft_kernels.nf4.dequantize_triton import dequantize

        try:
            return dequantize(
                q, shape, _E4M3, kind, block_size, factor=factor, transposed=transposed
            )
        except LaunchError as error:
            note_refusal(op, dtype, "", device, backend, error)
    W = dequantize_4bit(q, shape, torch.float32, kind=kind, block_size=block_size, backend=backend)
    W8 = (W * factor).to(_E4M3)
    return W8.mT.contiguous() if transposed else W8


def _dequantize_e4m3_fake(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    scale: Tensor,
    shape: Sequence[int],
    transposed: bool,
    kind: str,
    block_size: int,
    backend: Backend = "auto",
) -> Tensor:
    return packed.new_empty((shape[1], shape[0]) if transposed else tuple(shape), dtype=_E4M3)


define_op(
    "dequantize_e4m3(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, Tensor scale, "
    "SymInt[] shape, bool transposed, str kind, int block_size, str backend='auto') -> Tensor",
    fake=_dequantize_e4m3_fake,
    default=_dequantize_e4m3,
)


def dequantize_e4m3(
    q: Packed4bit,
    shape: Sequence[int],
    scale: Tensor,
    *,
    transposed: bool = False,
    kind: str = "nf4",
    block_size: int = 64,
    backend: Backend | None = None,
) -> Tensor:
    """Return W / scale in e4m3, [N, K], or [K, N] if `transposed`; one launch."""
    more = transposed, kind, block_size, backend or current_backend()
    if torch.compiler.is_compiling() or type(q.packed) not in PLAIN_TYPES:
        W8: Tensor = torch.ops.lightning_peft.dequantize_e4m3(*q, scale, list(shape), *more)
        return W8
    return _dequantize_e4m3(*q, scale, shape, *more)


def _quantize_rows(x: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    op, device = "quantize_rows_e4m3", x.device
    chip = chip_of(device)
    if (chip is None or not chip.no_e4m3) and launches(op, device, x.dtype, backend):
        from lightning_peft_kernels.fp8.quantize_rows_triton import quantize_rows

        try:
            return quantize_rows(x.contiguous(), _LARGEST, _LEAST)
        except LaunchError as error:
            note_refusal(op, x.dtype, "", device, backend, error)
    wide = x.float()
    peak = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
    scale = peak.clamp_min(_LEAST) / _LARGEST
    return (wide * (1.0 / scale)).to(_E4M3), scale


def _quantize_rows_fake(x: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=_E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)


define_op(
    "quantize_rows_e4m3(Tensor x, str backend='auto') -> (Tensor, Tensor)",
    fake=_quantize_rows_fake,
    default=_quantize_rows,
)


def quantize_rows_e4m3(x: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Return (x / scale in e4m3, scale fp32 [M, 1]) of x [M, K].

    A row with inf or NaN becomes NaN.
    """
    requested = backend or current_backend()
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TYPES:
        x8, scale = torch.ops.lightning_peft.quantize_rows_e4m3(x, requested)
        return x8, scale
    return _quantize_rows(x, requested)


def scaled_mm(
    x8: Tensor,
    x_scale: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype,
    decision: Decision,
    *,
    fast: bool,
) -> Tensor:
    """Compute (x_scale · x8) (w_scale · w8)ᵀ in `dtype`.

    Args:
        x8: e4m3 [M, K].
        x_scale: fp32 [M, 1].
        w8: e4m3 [N, K].
        w_scale: fp32 [1].
        dtype: Dtype of the result.
        decision: Result of `select_fp8`.
        fast: If True, partial sums may use fewer bits.
    """
    if decision.backend == "emulated" or not x8.shape[0]:
        # Steps of 2⁻⁹ up to 448 keep all bits in 16, also scaled by 2⁻⁸. A sum of products then
        # stays within fp16 for K up to 21,000.
        product = (x8.to(dtype) * _SHIFT) @ (w8.to(dtype) * _SHIFT).mT
        return (product.float() * (x_scale * w_scale / _SHIFT**2)).to(dtype)
    if decision.backend == "scaled_rows":
        one = torch.ones((), device=x8.device)
        y = torch._scaled_mm(
            x8, w8.t(), scale_a=one, scale_b=w_scale.reshape(()), out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )  # fmt: skip
        return (y * x_scale).to(dtype)
    # Both operands need scales per row: the library has no recipe for one per row and one per
    # tensor. The result is bf16.
    by_column = w_scale.reshape(1, 1).expand(1, w8.shape[0]).contiguous()
    y = torch._scaled_mm(
        x8, w8.t(), scale_a=x_scale, scale_b=by_column, out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )  # fmt: skip
    return y.to(dtype)
