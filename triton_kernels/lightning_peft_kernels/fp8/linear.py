"""Products with a frozen 4-bit base in e4m3: y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias.

W goes from 4 bit to e4m3 with one scale for the whole tensor, s_W = max |absmax| / 448 (every block
holds a code ±1, so its largest scale is its largest magnitude): no pass over the weights, no wait
for the device, and the same values serve dX, where a scale a row would lie on the contracted axis.
Rows of x and of dY are scaled one by one, s_m = max |row| / 448. The low-rank branch, S and dS stay
in the adapters' dtype, so an overflow still shows as inf or NaN.
    y = s_x s_W (x8 · W8ᵀ) + …       dX = s_dY s_W (dY8 · W8) + drop(dS A)
Shapes: x [..., K], W [N, K], A [R, K], B [N, R]; N and K multiples of 16. On a chip without e4m3
products the same values are multiplied in fp32: slower, equal numerics.
Output error against the exact weights, normal random data: 9.9 %, NF4 alone 9.2 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import added, applied, autocast_off, flat, refuse_recording
from lightning_peft_kernels.dispatch import Decision, choose
from lightning_peft_kernels.lora.linear import (
    Plan,
    lora_branch,
    lora_up_backward,
    prepare,
    rank_backward,
)
from lightning_peft_kernels.nf4.ops import Packed4bit, block_scales, dequantize_4bit_reference

__all__ = [
    "choose_fp8",
    "dequantize_e4m3",
    "e4m3_scale",
    "fp8_lora_linear",
    "quantize_rows_e4m3",
    "scaled_mm",
]

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_LEAST = 1e-30  # of a row of zeros, so that 0 / scale is 0


def choose_fp8(shape: Sequence[int], device: torch.device) -> Decision:
    """How a base of this shape is multiplied; ``"dequantize"`` where e4m3 cannot serve."""
    if len(shape) != 2 or shape[0] % 16 or shape[1] % 16:
        return Decision("dequantize", f"e4m3 products need multiples of 16, got {tuple(shape)}")
    if device.type == "cuda":
        if torch.version.hip is not None:
            return Decision("dequantize", "e4m3 of this chip is another format")
        if torch.cuda.get_device_capability(device) >= (8, 9):
            return Decision("scaled_mm", "e4m3 products of the chip")
    return Decision("emulated", f"no e4m3 products on {device.type}: multiplied in fp32")


# ---- values


def e4m3_scale(q: Packed4bit) -> Tensor:
    """s_W fp32 [1] of one weight."""
    return block_scales(q).abs().amax().clamp_min(_LEAST).div(_LARGEST).reshape(1)


_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define(
    "dequantize_e4m3(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, Tensor scale, "
    "SymInt[] shape, bool transposed, str kind, int block_size) -> Tensor"
)
_library.define("quantize_rows_e4m3(Tensor x) -> (Tensor, Tensor)")


def _dequantize_impl(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    scale: Tensor,
    shape: Sequence[int],
    transposed: bool,
    kind: str,
    block_size: int,
) -> Tensor:
    q, factor = Packed4bit(packed, absmax, absmax2, offset), 1.0 / scale
    if choose("dequantize_e4m3", packed.device, torch.bfloat16).backend == "triton":
        from lightning_peft_kernels.nf4.dequantize_triton import dequantize

        return dequantize(q, shape, _E4M3, kind, block_size, factor=factor, transposed=transposed)
    W = dequantize_4bit_reference(q, shape, torch.float32, kind=kind, block_size=block_size)
    W8 = (W * factor).to(_E4M3)
    return W8.mT.contiguous() if transposed else W8


def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    scale: Tensor,
    shape: Sequence[int],
    transposed: bool,
    kind: str,
    block_size: int,
) -> Tensor:
    return packed.new_empty((shape[1], shape[0]) if transposed else tuple(shape), dtype=_E4M3)


def _rows_impl(x: Tensor) -> tuple[Tensor, Tensor]:
    if choose("quantize_rows_e4m3", x.device, x.dtype).backend == "triton":
        from lightning_peft_kernels.fp8.quantize_rows_triton import quantize_rows

        return quantize_rows(x.contiguous(), _LARGEST, _LEAST)
    wide = x.float()
    peak = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
    scale = peak.clamp_min(_LEAST) / _LARGEST
    return (wide * (1.0 / scale)).to(_E4M3), scale


def _rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=_E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)


_library.impl("dequantize_e4m3", _dequantize_impl, "CompositeExplicitAutograd")
_library.impl("quantize_rows_e4m3", _rows_impl, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_peft::dequantize_e4m3", _dequantize_fake, lib=_library)
torch.library.register_fake("lightning_peft::quantize_rows_e4m3", _rows_fake, lib=_library)


def dequantize_e4m3(
    q: Packed4bit,
    shape: Sequence[int],
    scale: Tensor,
    *,
    transposed: bool = False,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """W / scale in e4m3, [N, K] or, transposed, [K, N]; one launch."""
    W8: Tensor = torch.ops.lightning_peft.dequantize_e4m3(
        *q, scale, list(shape), transposed, kind, block_size
    )
    return W8


def quantize_rows_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / scale in e4m3, scale fp32 [M, 1]) of x [M, K]; a row with inf or NaN becomes NaN."""
    x8, scale = torch.ops.lightning_peft.quantize_rows_e4m3(x)
    return x8, scale


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
    """(x_scale · x8) (w_scale · w8)ᵀ in `dtype`.

    Args:
        x8: e4m3 [M, K].
        x_scale: fp32 [M, 1].
        w8: e4m3 [N, K].
        w_scale: fp32 [1].
        dtype: Of the result.
        decision: Of `choose_fp8`.
        fast: Whether partial sums may be kept in fewer bits.
    """
    if decision.backend != "scaled_mm" or not x8.shape[0]:
        product = x8.float() @ w8.float().mT
        return (product * (x_scale * w_scale)).to(dtype)
    # Scales by row on both sides: mixed with one a tensor is no recipe. Its result is bf16.
    by_column = w_scale.reshape(1, 1).expand(1, w8.shape[0]).contiguous()
    y = torch._scaled_mm(
        x8, w8.t(), scale_a=x_scale, scale_b=by_column, out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )  # fmt: skip
    return y.to(dtype)


# ---- the layer


class _FP8LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        offset: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        plan: Plan,
        shape: tuple[int, ...],
        kind: str,
        block_size: int,
    ) -> Tensor:
        x2 = flat(x)
        q = Packed4bit(packed, absmax, absmax2, offset)
        decision = choose_fp8(shape, x.device)
        W8 = dequantize_e4m3(q, shape, scale, kind=kind, block_size=block_size)
        y = scaled_mm(*quantize_rows_e4m3(x2), W8, scale, x.dtype, decision, fast=True)
        S = seed = None
        if A is not None and B is not None:
            low, S, seed = lora_branch(x2, A, B, plan, x.dtype)
            y = added(y, low)
        if bias is not None:
            y = added(y, bias)
        kept = x2 if A is not None and ctx.needs_input_grad[7] else None
        ctx.save_for_backward(kept, S, seed, A, B, packed, absmax, absmax2, offset, scale)
        ctx.plan, ctx.packing = plan, (shape, kind, block_size)
        ctx.leading, ctx.decision = x.shape[:-1], decision
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        refuse_recording("fp8_lora_linear", "its products are rounded: compute in 16 or 32 bits")
        x2, S, seed, A, B, *packed, scale = ctx.saved_tensors
        shape, kind, block_size = ctx.packing
        needs, plan = ctx.needs_input_grad, ctx.plan
        dY2 = flat(dY)
        dX = dS = dA = dB = None
        if A is not None:
            dS, dA, dB = rank_backward(dY2, x2, S, seed, A, B, plan, needs[7], needs[8], needs[0])
        if needs[0]:
            q = Packed4bit(*packed)
            W8 = dequantize_e4m3(q, shape, scale, transposed=True, kind=kind, block_size=block_size)
            dX = scaled_mm(*quantize_rows_e4m3(dY2), W8, scale, dY.dtype, ctx.decision, fast=False)
            if dS is not None:
                dX = added(dX, lora_up_backward(dS, A, seed, plan))
            dX = dX.view(*ctx.leading, dX.shape[-1])
        d_bias = dY2.sum(0) if needs[6] else None
        return dX, None, None, None, None, None, d_bias, dA, dB, None, None, None, None


def fp8_lora_linear(
    x: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    scale: Tensor,
    bias: Tensor | None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Y = x Wᵀ + scaling · drop(x) Aᵀ Bᵀ + bias with the product with W in e4m3; differentiable in
    x, A, B and bias.

    Args:
        x: [..., K] floating.
        q: Bytes of W.
        shape: [N, K].
        scale: `e4m3_scale(q)`, made once.
        bias: [N] or None.
        A: [R, K], or None for the base alone.
        B: [N, R], or None.
        scaling: Number or 0-d tensor.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: As quantised.
        dropout_p: Probability of dropping an element of x in the low-rank branch.
        training: Whether dropout is on.

    Raises:
        ValueError: N or K is no multiple of 16.
    """
    decision = choose_fp8(shape, x.device)
    if decision.backend == "dequantize":
        raise ValueError(f"fp8_lora_linear: {decision.reason}; use nf4_lora_linear")
    p = dropout_p if training else 0.0
    if A is None or B is None:
        empty = x.new_empty(0)
        x, _, _, bias, plan = prepare(x, empty, empty, bias, 1.0, 0.0)
        A = B = None
    else:
        x, A, B, bias, plan = prepare(x, A, B, bias, scaling, p)
    with autocast_off(x.device.type):
        y: Tensor = applied(
            _FP8LoRALinear, x, *q, scale, bias, A, B, plan, tuple(shape), kind, block_size
        )
    return y
