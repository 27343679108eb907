"""Linear layers over a packed base: y = x Wᵀ + bias, and y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias.

Shapes: x [..., K], W [N, K] packed, A [R, K], B [N, R]. W is dequantised for each product and
dropped; backward dequantises it again for dX = dY W, unless it was kept by the recomputation of a
checkpoint. Few tokens are multiplied by W as it is decoded. S = s · drop(x) Aᵀ [M, R] is saved, not
recomputed; the base product is added onto the LoRA term in place (`addmm_`, β = 1), so that y is
written once and no pass over it is spent on the sum.
    dS = s · dY B      dB = s · dYᵀ S'      dA = dSᵀ drop(x)      dX = dY W + drop(dS A)
Rank-sized products run in the adapters' dtype where it is wider than x's and autocast is off, as
Hugging Face peft does; gradients of A and B come back in the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import (
    add_product,
    added,
    applied,
    autocast_off,
    flat,
    gradients_of,
    recording,
    transformed,
    unflat,
)
from lightning_peft_kernels.dispatch import choose_product
from lightning_peft_kernels.lora.linear import (
    Plan,
    lora_backward,
    lora_down,
    plain_branch,
    prepare,
)
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit_reference
from lightning_peft_kernels.nf4.small_batch import nf4_decode
from lightning_peft_kernels.nf4.weight_buffers import keeps_for_backward, kept_weights, weights

__all__ = ["nf4_linear", "nf4_lora_linear", "nf4_lora_linear_reference"]


def nf4_lora_linear_reference(
    x: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """The formula in plain torch, without dropout."""
    W = dequantize_4bit_reference(q, shape, x.dtype, kind=kind, block_size=block_size)
    y = torch.nn.functional.linear(x, W, bias)
    return y + (x.to(A.dtype) @ A.mT @ B.mT * scaling).to(y.dtype)


class _NF4Linear(torch.autograd.Function):
    """y = x Wᵀ + bias; the weight is dequantised in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        kind: str,
        block_size: int,
    ) -> Tensor:
        q, ctx.packing = Packed4bit(packed, absmax, absmax2, offset), (shape, kind, block_size)
        x2 = flat(x)
        W = None
        if choose_product(x.device, x.dtype, x2.shape[0], shape).backend == "fused":
            y = nf4_decode(x2, q, shape, None, None, bias, kind=kind, block_size=block_size)
        else:
            keep = ctx.needs_input_grad[0] and keeps_for_backward()
            W = (kept_weights if keep else weights)(q, shape, x.dtype, kind, block_size)
            y = torch.nn.functional.linear(x2, W, bias)
            W = W if keep else None
        ctx.save_for_backward(W, *q)
        return unflat(y, x)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        dX = d_bias = None
        if ctx.needs_input_grad[0]:
            dX = dY @ _backward_weights(ctx, dY.dtype, *ctx.saved_tensors)
        if ctx.needs_input_grad[5]:
            d_bias = dY.reshape(-1, dY.shape[-1]).sum(0)
        return dX, None, None, None, None, d_bias, None, None, None


class _NF4LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        plan: Plan,
        shape: tuple[int, ...],
        kind: str,
        block_size: int,
    ) -> Tensor:
        x2 = flat(x)
        q = Packed4bit(packed, absmax, absmax2, offset)
        S, seed = lora_down(x2, A, plan)
        W = None
        fits = plan.dtype == x.dtype
        if fits and choose_product(x.device, x.dtype, x2.shape[0], shape).backend == "fused":
            y = nf4_decode(x2, q, shape, S, B, bias, kind=kind, block_size=block_size)
        else:
            keep = ctx.needs_input_grad[0] and keeps_for_backward()
            W = (kept_weights if keep else weights)(q, shape, x.dtype, kind, block_size)
            y = add_product((S @ B.mT).to(x.dtype), x2, W.mT)
            if bias is not None:
                y = added(y, bias)
            W = W if keep else None
        ctx.save_for_backward(x, S, seed, A, B, W, *q)
        ctx.plan, ctx.packing = plan, (shape, kind, block_size)
        return unflat(y, x)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        x, S, seed, A, B, *rest = ctx.saved_tensors
        x2, dY2 = flat(x), flat(dY)
        needs_X, *_, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:8]
        W = _backward_weights(ctx, dY.dtype, *rest) if needs_X else None
        d_bias = dY2.sum(0) if needs_bias else None
        if recording():

            def formula(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
                low = plain_branch(x, A, B, ctx.plan, seed)
                return low if W is None else low + torch.nn.functional.linear(x, W)

            dX, dA, dB = gradients_of(formula, (x, A, B), (needs_X, needs_A, needs_B), dY)
            return dX, None, None, None, None, d_bias, dA, dB, None, None, None, None
        dX, dA, dB = lora_backward(dY2, x2, S, seed, A, B, W, ctx.plan, needs_A, needs_B)
        if dX is not None:
            dX = dX.view(x.shape)
        return dX, None, None, None, None, d_bias, dA, dB, None, None, None, None


def _backward_weights(
    ctx: Any, dtype: torch.dtype, W: Tensor | None, *packed: Tensor | None
) -> Tensor:
    """W as the recomputation left it, or dequantised."""
    if W is not None and W.dtype == dtype:
        return W
    return weights(Packed4bit(*packed), ctx.packing[0], dtype, *ctx.packing[1:])  # type: ignore[arg-type]


def nf4_linear(
    x: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    bias: Tensor | None,
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """Y = x Wᵀ + bias with W [N, K] packed; runs in autocast's dtype where it is on, else in
    x's.
    """
    x, bias = _autocast(x, bias)
    with autocast_off(x.device.type):
        if transformed():
            W = kept_weights(q, shape, x.dtype, kind, block_size)
            return torch.nn.functional.linear(x, W, bias)
        y: Tensor = applied(_NF4Linear, x, *q, bias, tuple(shape), kind, block_size)
    return y


def nf4_lora_linear(
    x: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Y = x Wᵀ + scaling · drop(x) Aᵀ Bᵀ + bias with W [N, K] packed; differentiable in x, A, B and
    bias.

    Args:
        x: [..., K] floating.
        q: Bytes of W.
        shape: [N, K].
        bias: [N] or None.
        A: [R, K].
        B: [N, R].
        scaling: Number or 0-d tensor.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: As quantised.
        dropout_p: Probability of dropping an element of x in the low-rank branch.
        training: Whether dropout is on.
    """
    x, A, B, bias, plan = prepare(x, A, B, bias, scaling, dropout_p if training else 0.0)
    with autocast_off(x.device.type):
        if transformed():
            W = kept_weights(q, shape, x.dtype, kind, block_size)
            return torch.nn.functional.linear(x, W, bias) + plain_branch(x, A, B, plan)
        y: Tensor = applied(_NF4LoRALinear, x, *q, bias, A, B, plan, tuple(shape), kind, block_size)
    return y


def _autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return x, bias
