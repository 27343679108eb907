"""Linear layers with a packed base, without and with LoRA.

    y = x Wᵀ + bias
    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias

Shapes: x [..., K], W [N, K] packed, A [R, K], B [N, R]. Every product dequantises W into a buffer;
backward dequantises it again for dX = dY W. Products with few tokens decode W on the fly.
S = s · drop(x) Aᵀ [M, R] is saved, not recomputed. The base product is added onto the LoRA term in
place (`addmm_`, β = 1), so y is written once and the sum needs no pass of its own.
    dS = s · dY B      dB = s · dYᵀ S'      dA = dSᵀ drop(x)      dX = dY W + drop(dS A)
Without autocast, rank-sized products run in the adapters' dtype if it is wider than x's, as in
Hugging Face peft. Gradients of A and B are returned in the dtype of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import (
    Context,
    Grads,
    KernelFunction,
    add_maybe_inplace,
    add_product,
    apply_or_forward,
    autocast_off,
    flatten_rows,
    gradients_of,
    in_functorch_transform,
    is_double_backward,
    is_plain_eager,
    unflatten_rows,
)
from lightning_peft_kernels.dispatch import Backend, current_backend
from lightning_peft_kernels.lora.linear import (
    LoRASpec,
    lora_backward,
    lora_branch_by_torch,
    lora_down,
    prepare,
)
from lightning_peft_kernels.nf4.bf16_cpu import REORDERED, drop_reordered
from lightning_peft_kernels.nf4.generation import linear_without_gradients
from lightning_peft_kernels.nf4.ops import dequantize_4bit, dequantize_4bit_reference
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing
from lightning_peft_kernels.nf4.selection import select_product
from lightning_peft_kernels.nf4.small_batch import nf4_small_batch
from lightning_peft_kernels.nf4.weight_buffers import weight_for_product

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
    """Compute `nf4_lora_linear` in plain torch, without dropout."""
    W = dequantize_4bit_reference(q, shape, x.dtype, kind=kind, block_size=block_size)
    y = torch.nn.functional.linear(x, W, bias)
    return y + (x.to(A.dtype) @ A.mT @ B.mT * scaling).to(y.dtype)


class _NF4Context(Context, Protocol):
    """What forward saves for backward."""

    packing: Packing
    backend: Backend


class _NF4Linear(KernelFunction):
    """y = x Wᵀ + bias; the weight is dequantised in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: _NF4Context,
        x: Tensor,
        bias: Tensor | None,
        q: Packed4bit,
        packing: Packing,
        backend: Backend,
    ) -> Tensor:
        x2 = flatten_rows(x)
        shape, kind, block_size = packing
        how = select_product(x.device, x.dtype, x2.shape[0], shape, backend, block_size)
        if how.backend != "dequantize":
            y = nf4_small_batch(
                x2, q, shape, bias=bias, kind=kind, block_size=block_size, backend=backend
            )
        else:
            W = weight_for_product(q, packing, x.dtype, backend)
            y = torch.nn.functional.linear(x2, W, bias)
        ctx.save_for_backward(*q)
        ctx.packing, ctx.backend = packing, backend
        return unflatten_rows(y, x)

    @staticmethod
    def backward(ctx: _NF4Context, dY: Tensor) -> Grads:
        dX = d_bias = None
        if ctx.needs_input_grad[0]:
            q = Packed4bit(*ctx.saved_tensors)
            dX = dY @ weight_for_product(q, ctx.packing, dY.dtype, ctx.backend)
        if ctx.needs_input_grad[1]:
            d_bias = dY.reshape(-1, dY.shape[-1]).sum(0)
        return dX, d_bias, None, None, None


class _NF4LoRAContext(Context, Protocol):
    """What forward saves for backward."""

    packing: Packing
    spec: LoRASpec


class _NF4LoRALinear(KernelFunction):
    """y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias, forward and backward by hand."""

    @staticmethod
    def forward(
        ctx: _NF4LoRAContext,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        q: Packed4bit,
        packing: Packing,
        spec: LoRASpec,
    ) -> Tensor:
        x2 = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        S, seed = lora_down(x2, A, spec)
        shape, kind, block_size = packing
        how = select_product(x.device, x.dtype, x2.shape[0], shape, spec.backend, block_size)
        if spec.dtype == x.dtype and how.backend != "dequantize":
            y = nf4_small_batch(
                x2, q, shape, S, B, bias, kind=kind, block_size=block_size, backend=spec.backend
            )
        else:
            W = weight_for_product(q, packing, x.dtype, spec.backend)
            y = add_product((S @ B.mT).to(x.dtype), x2, W.mT)
            if bias is not None:
                y = add_maybe_inplace(y, bias)
        ctx.save_for_backward(x, S, seed, A, B, *q)
        ctx.packing, ctx.spec = packing, spec
        return y if x.ndim == 2 else unflatten_rows(y, x)

    @staticmethod
    def backward(ctx: _NF4LoRAContext, dY: Tensor) -> Grads:
        x, S, seed, A, B, *packed = ctx.saved_tensors
        spec = ctx.spec
        x2, dY2 = x, dY
        if x.ndim != 2:
            x2, dY2 = x.reshape(-1, x.shape[-1]), dY.reshape(-1, dY.shape[-1])
        needs_X, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:4]
        W = None
        if needs_X:
            W = weight_for_product(Packed4bit(*packed), ctx.packing, dY.dtype, spec.backend)
        d_bias = dY2.sum(0) if needs_bias else None
        if is_double_backward():

            def formula(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
                low = lora_branch_by_torch(x, A, B, spec, seed)
                return low if W is None else low + torch.nn.functional.linear(x, W)

            dX, dA, dB = gradients_of(formula, (x, A, B), (needs_X, needs_A, needs_B), dY)
            return dX, d_bias, dA, dB, None, None, None
        dX, dA, dB = lora_backward(dY2, x2, S, seed, A, B, W, spec, needs_A, needs_B)
        if dX is not None:
            dX = dX.view(x.shape)
        return dX, d_bias, dA, dB, None, None, None


def nf4_linear(
    x: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    bias: Tensor | None,
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """Compute ``y = x Wᵀ + bias`` with W [N, K] packed; differentiable in x and bias.

    Runs in the dtype of autocast if it is on, else in the dtype of x.

    Args:
        x: [..., K] floating.
        q: Bytes of W.
        shape: [N, K].
        bias: [N] or None.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.
    """
    if not torch.is_grad_enabled() and is_plain_eager(x.device.type):
        return linear_without_gradients(x, q, Packing(shape, kind, block_size), bias)
    x, bias = _autocast(x, bias)
    with autocast_off(x.device.type):
        if in_functorch_transform():
            W = dequantize_4bit(q, shape, x.dtype, kind=kind, block_size=block_size)
            return torch.nn.functional.linear(x, W, bias)
        packing = Packing(tuple(shape), kind, block_size)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and REORDERED:
            drop_reordered(q)  # training resumes
        y: Tensor = apply_or_forward(_NF4Linear, x, bias, q, packing, current_backend())
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
) -> Tensor:
    """Compute ``y = x Wᵀ + scaling · drop(x) Aᵀ Bᵀ + bias`` with W [N, K] packed.

    Differentiable in x, A, B, bias and a tensor scaling.

    Args:
        x: [..., K] floating.
        q: Bytes of W.
        shape: [N, K].
        bias: [N] or None.
        A: [R, K].
        B: [N, R].
        scaling: Number or 0-d tensor.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.
        dropout_p: Probability of dropping an element of x in the low-rank branch; 0 in evaluation.
    """
    if (
        not torch.is_grad_enabled()
        and not dropout_p
        and not isinstance(scaling, Tensor)
        and is_plain_eager(x.device.type)
    ):
        packing = Packing(shape, kind, block_size)
        return linear_without_gradients(x, q, packing, bias, A, B, scaling)
    x, A, B, bias, spec = prepare(x, A, B, bias, scaling, dropout_p)
    if torch.is_grad_enabled() and is_plain_eager(x.device.type):
        if REORDERED:
            drop_reordered(q)  # training resumes
        packing = Packing(tuple(shape), kind, block_size)
        trained: Tensor = _NF4LoRALinear.apply(x, bias, A, B, q, packing, spec)
        return trained
    with autocast_off(x.device.type):
        if in_functorch_transform():
            W = dequantize_4bit(q, shape, x.dtype, kind=kind, block_size=block_size)
            return torch.nn.functional.linear(x, W, bias) + lora_branch_by_torch(x, A, B, spec)
        packing = Packing(tuple(shape), kind, block_size)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and REORDERED:
            drop_reordered(q)  # training resumes
        y: Tensor = apply_or_forward(_NF4LoRALinear, x, bias, A, B, q, packing, spec)
    return y


def _autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return x, bias
