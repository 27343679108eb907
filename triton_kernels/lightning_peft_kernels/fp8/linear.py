"""Linear layers whose product with a frozen 4-bit base runs in e4m3.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias
      = s_x s_W (x8 · W8ᵀ) + …               dX = s_dY s_W (dY8 · W8) + drop(dS A)

W is converted from 4 bits to e4m3 with one scale per tensor, s_W = max |absmax| / 448. Every block
holds a code of ±1, so its largest scale is its largest magnitude; this takes no pass over the
weights and does not wait for the device. dX reuses the same values; a scale per row would lie on
the contracted axis. Rows of x and dY have a scale each, s_m = max |row| / 448. The low-rank branch,
S and dS stay in the adapters' dtype, so an overflow still shows as inf or NaN.

Shapes: x [..., K], W [N, K], A [R, K], B [N, R]; N and K are multiples of 16. A chip without e4m3
products multiplies the same values in fp32: slower, with equal numerics.
Output error against the exact weights, normal random data: 9.9 %; NF4 without e4m3 9.2 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import (
    Context,
    Grads,
    KernelFunction,
    add_maybe_inplace,
    apply_or_forward,
    autocast_off,
    check_no_double_backward,
    flatten_rows,
)
from lightning_peft_kernels.dispatch import Backend, Decision, current_backend, select
from lightning_peft_kernels.lora.linear import (
    LoRASpec,
    lora_branch,
    lora_up_backward,
    prepare,
    rank_backward,
)
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing
from lightning_peft_kernels.nf4.reference import block_scales, dequantize_4bit_reference
from lightning_peft_kernels.registration import define_op

__all__ = [
    "dequantize_e4m3",
    "e4m3_scale",
    "fp8_lora_linear",
    "quantize_rows_e4m3",
    "scaled_mm",
    "select_fp8",
]

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_LEAST = 1e-30  # scale of a row of zeros, so that 0 / scale is 0


def select_fp8(shape: Sequence[int], device: torch.device) -> Decision:
    """Select how a base of this shape is multiplied; ``"dequantize"`` if e4m3 does not fit."""
    if len(shape) != 2 or shape[0] % 16 or shape[1] % 16:
        return Decision("dequantize", f"e4m3 products need multiples of 16, got {tuple(shape)}")
    if device.type == "cuda":
        if torch.version.hip is not None:
            return Decision("dequantize", "this chip uses another e4m3 format")
        if torch.cuda.get_device_capability(device) >= (8, 9):
            return Decision("scaled_mm", "e4m3 products of the chip")
    return Decision("emulated", f"no e4m3 products on {device.type}: multiplied in fp32")


# ---- values


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
    if select("dequantize_e4m3", packed.device, torch.bfloat16, backend).backend == "triton":
        from lightning_peft_kernels.nf4.dequantize_triton import dequantize

        return dequantize(q, shape, _E4M3, kind, block_size, factor=factor, transposed=transposed)
    W = dequantize_4bit_reference(q, shape, torch.float32, kind=kind, block_size=block_size)
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
    W8: Tensor = torch.ops.lightning_peft.dequantize_e4m3(
        *q, scale, list(shape), transposed, kind, block_size, backend or current_backend()
    )
    return W8


def _quantize_rows(x: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    if select("quantize_rows_e4m3", x.device, x.dtype, backend).backend == "triton":
        from lightning_peft_kernels.fp8.quantize_rows_triton import quantize_rows

        return quantize_rows(x.contiguous(), _LARGEST, _LEAST)
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
    x8, scale = torch.ops.lightning_peft.quantize_rows_e4m3(x, backend or current_backend())
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
    if decision.backend != "scaled_mm" or not x8.shape[0]:
        product = x8.float() @ w8.float().mT
        return (product * (x_scale * w_scale)).to(dtype)
    # Both operands need scales per row: the library has no recipe for one per row and one per
    # tensor. The result is bf16.
    by_column = w_scale.reshape(1, 1).expand(1, w8.shape[0]).contiguous()
    y = torch._scaled_mm(
        x8, w8.t(), scale_a=x_scale, scale_b=by_column, out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )  # fmt: skip
    return y.to(dtype)


# ---- the layer


class _Context(Context, Protocol):
    """What forward saves for backward."""

    packing: Packing
    spec: LoRASpec
    decision: Decision
    leading: torch.Size


class _FP8LoRALinear(KernelFunction):
    """The base product in e4m3, the low-rank branch in the adapters' dtype."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        q: Packed4bit,
        scale: Tensor,
        packing: Packing,
        spec: LoRASpec,
    ) -> Tensor:
        x2 = flatten_rows(x)
        shape, kind, block_size = packing
        how: dict[str, Any] = {"kind": kind, "block_size": block_size, "backend": spec.backend}
        decision = select_fp8(shape, x.device)
        W8 = dequantize_e4m3(q, shape, scale, **how)
        x8, x_scale = quantize_rows_e4m3(x2, backend=spec.backend)
        y = scaled_mm(x8, x_scale, W8, scale, x.dtype, decision, fast=True)
        S = seed = None
        if A is not None and B is not None:
            low, S, seed = lora_branch(x2, A, B, spec, x.dtype)
            y = add_maybe_inplace(y, low)
        if bias is not None:
            y = add_maybe_inplace(y, bias)
        saved = x2 if A is not None and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(saved, S, seed, A, B, scale, *q)
        ctx.packing, ctx.spec, ctx.decision = packing, spec, decision
        ctx.leading = x.shape[:-1]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: _Context, dY: Tensor) -> Grads:
        check_no_double_backward(
            "fp8_lora_linear", "its products are rounded: compute in 16 or 32 bits"
        )
        x2, S, seed, A, B, scale, *packed = ctx.saved_tensors
        needs_X, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:4]
        spec = ctx.spec
        shape, kind, block_size = ctx.packing
        dY2 = flatten_rows(dY)
        dX = dS = dA = dB = None
        if A is not None:
            dS, dA, dB = rank_backward(dY2, x2, S, seed, A, B, spec, needs_A, needs_B, needs_X)
        if needs_X:
            W8 = dequantize_e4m3(
                Packed4bit(*packed), shape, scale, transposed=True, kind=kind,
                block_size=block_size, backend=spec.backend,
            )  # fmt: skip
            dY8, dY_scale = quantize_rows_e4m3(dY2, backend=spec.backend)
            dX = scaled_mm(dY8, dY_scale, W8, scale, dY.dtype, ctx.decision, fast=False)
            if dS is not None:
                dX = add_maybe_inplace(dX, lora_up_backward(dS, A, seed, spec))
            dX = dX.view(*ctx.leading, dX.shape[-1])
        d_bias = dY2.sum(0) if needs_bias else None
        return dX, d_bias, dA, dB, None, None, None, None


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
) -> Tensor:
    """Compute ``y = x Wᵀ + scaling · drop(x) Aᵀ Bᵀ + bias``, the product with W in e4m3.

    Differentiable in x, A, B, bias and a tensor scaling.

    Args:
        x: [..., K] floating.
        q: Bytes of W.
        shape: [N, K].
        scale: `e4m3_scale(q)`; compute it once.
        bias: [N] or None.
        A: [R, K], or None without a low-rank branch.
        B: [N, R], or None.
        scaling: Number or 0-d tensor.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.
        dropout_p: Probability of dropping an element of x in the low-rank branch; 0 in evaluation.

    Raises:
        ValueError: N or K is not a multiple of 16.
    """
    decision = select_fp8(shape, x.device)
    if decision.backend == "dequantize":
        raise ValueError(f"fp8_lora_linear: {decision.reason}; use nf4_lora_linear")
    if A is None or B is None:
        empty = x.new_empty(0)
        x, _, _, bias, spec = prepare(x, empty, empty, bias, 1.0, 0.0)
        A = B = None
    else:
        x, A, B, bias, spec = prepare(x, A, B, bias, scaling, dropout_p)
    packing = Packing(tuple(shape), kind, block_size)
    with autocast_off(x.device.type):
        y: Tensor = apply_or_forward(_FP8LoRALinear, x, bias, A, B, q, scale, packing, spec)
    return y
