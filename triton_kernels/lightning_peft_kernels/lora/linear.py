"""LoRA on a dense linear layer: y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias, with a hand-written backward.

Shapes: x [..., K], W [N, K] frozen or trained, A [R, K], B [N, R]; M is the number of rows of x.
S = drop(x) Aᵀ [M, R] is saved, not recomputed; the usual fast algorithm reads x twice more. Dropout
saves its seed only, and backward draws the mask again; the mask of a small x on a CPU is kept. The
scale multiplies the rank side, M·R elements instead of M·N. If a kernel applies, dS = s · dY B and
dB = dYᵀ S come from one pass over dY (`rank_gradients`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft_kernels.autograd import (
    Context,
    Grads,
    KernelFunction,
    add_product,
    autocast_off,
    flatten_rows,
    gradients_of,
    in_functorch_transform,
    is_double_backward,
    is_plain_eager,
    scaled_linear,
    unflatten_rows,
)
from lightning_peft_kernels.dispatch import Backend, current_backend
from lightning_peft_kernels.dropout.ops import draw_seed, seeded_dropout, small_mask
from lightning_peft_kernels.lora.rank_gradients import rank_gradients

__all__ = ["LoRASpec", "add_low_rank_", "drop", "lora_linear", "lora_linear_reference"]


class LoRASpec(NamedTuple):
    """Settings that forward and backward share.

    Attributes:
        scaling: s, a number; a tensor scale is folded into B first.
        dropout_p: Probability of dropping an element of x.
        dtype: Dtype of the rank-sized products.
        backend: Backend requested when forward ran.
    """

    scaling: float
    dropout_p: float
    dtype: torch.dtype
    backend: Backend


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float | Tensor
) -> Tensor:
    """Compute `lora_linear` in plain torch, without dropout."""
    return F.linear(x, weight, bias) + (x.to(A.dtype) @ A.mT @ B.mT * scaling).to(x.dtype)


def prepare(
    x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float | Tensor, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, LoRASpec]:
    """Cast by one rule for dtypes: that of autocast if it is on, else rank products in A's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # Differentiable casts: gradients return in the dtype of the parameters.
        x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    else:
        dtype = A.dtype
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling.to(B.dtype), 1.0
    return x, A, B, bias, LoRASpec(float(scaling), dropout_p, dtype, current_backend())


def drop(x: Tensor, seed: Tensor, spec: LoRASpec) -> Tensor:
    """Apply the mask of a seed, or the mask itself (`small_mask`)."""
    if seed.is_floating_point():
        # For few rows a view takes longer than the product.
        return x * (seed if seed.shape == x.shape else seed.view(x.shape))
    return seeded_dropout(x, seed, spec.dropout_p, backend=spec.backend)


def lora_down(x2: Tensor, A: Tensor, spec: LoRASpec) -> tuple[Tensor, Tensor | None]:
    """Return (S = s · drop(x) Aᵀ [M, R], seed or mask of the dropout or None)."""
    z, seed = x2 if x2.dtype == spec.dtype else x2.to(spec.dtype), None
    if spec.dropout_p:
        seed = small_mask(z, spec.dropout_p)
        seed = draw_seed(x2.device) if seed is None else seed
        z = drop(z, seed, spec)
    return scaled_linear(z, A, spec.scaling), seed


def lora_branch_by_torch(
    x: Tensor, A: Tensor, B: Tensor, spec: LoRASpec, seed: Tensor | None = None
) -> Tensor:
    """Compute s · drop(x) Aᵀ Bᵀ [..., N] in torch's own operations.

    Dropout uses the mask of `seed`, or torch's own mask if there is no seed.
    """
    z = x.to(spec.dtype)
    z = F.dropout(z, spec.dropout_p) if seed is None else drop(z, seed, spec)
    return F.linear(F.linear(z, A) * spec.scaling, B).to(x.dtype)


def lora_up_backward(dS: Tensor, A: Tensor, seed: Tensor | None, spec: LoRASpec) -> Tensor:
    """Return the branch's part of dX: drop(dS A) [M, K], with the mask of forward."""
    low = dS @ A
    return low if seed is None else drop(low, seed, spec)


def rank_backward(
    dY: Tensor,
    x2: Tensor | None,
    S: Tensor,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    spec: LoRASpec,
    needs_A: bool,
    needs_B: bool,
    needs_X: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dS, dA, dB), each None if nothing needs it.

    S includes the scale. Only dA reads x2.
    """
    g = dY if dY.dtype == spec.dtype else dY.to(spec.dtype)
    dS = dA = dB = None
    if needs_B and (needs_A or needs_X):
        dS, dB = rank_gradients(g, S, B, spec.scaling, backend=spec.backend)
    elif needs_B:
        dB = g.mT @ S
    elif needs_A or needs_X:
        dS = scaled_linear(g, B.mT, spec.scaling)
    if needs_A and dS is not None and x2 is not None:
        z = x2 if x2.dtype == spec.dtype else x2.to(spec.dtype)
        dA = dS.mT @ (z if seed is None else drop(z, seed, spec))
    return dS, dA, dB


def lora_backward(
    dY: Tensor,
    x2: Tensor,
    S: Tensor,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    W: Tensor | None,
    spec: LoRASpec,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dX, dA, dB); dX is None if W is."""
    dX = None
    dS, dA, dB = rank_backward(dY, x2, S, seed, A, B, spec, needs_A, needs_B, W is not None)
    if W is not None and dS is not None:
        low = dS @ A if seed is None else lora_up_backward(dS, A, seed, spec)
        dX = torch.addmm(low if low.dtype == dY.dtype else low.to(dY.dtype), dY, W)
    return dX, dA, dB


def _product(
    x2: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, spec: LoRASpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (Y [M, N], S [M, R], seed or None)."""
    # The base product comes first, as in the plain layer: with B = 0 no bit differs.
    y = F.linear(x2, W, bias)
    S, seed = lora_down(x2, A, spec)
    if spec.dtype == y.dtype:
        return add_product(y, S, B.mT), S, seed
    return y + F.linear(S, B).to(y.dtype), S, seed


class _Context(Context, Protocol):
    """What forward saves for backward."""

    spec: LoRASpec


class _LoRALinear(KernelFunction):
    """y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias with a dense W."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        spec: LoRASpec,
    ) -> Tensor:
        x2 = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y, S, seed = _product(x2, W, bias, A, B, spec)
        ctx.save_for_backward(x, S, seed, A, B, W)
        ctx.spec = spec
        return y if x.ndim == 2 else unflatten_rows(y, x)

    @staticmethod
    def backward(ctx: _Context, dY: Tensor) -> Grads:
        x, S, seed, A, B, W = ctx.saved_tensors
        x2, dY2 = x, dY
        if x.ndim != 2:
            x2, dY2 = x.reshape(-1, x.shape[-1]), dY.reshape(-1, dY.shape[-1])
        needs = ctx.needs_input_grad
        d_bias = dY2.sum(0) if needs[2] else None
        if is_double_backward():

            def formula(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
                return F.linear(x, W) + lora_branch_by_torch(x, A, B, ctx.spec, seed)

            wanted = [*needs[:2], *needs[3:5]]
            dX, dW, dA, dB = gradients_of(formula, (x, W, A, B), wanted, dY)
            return dX, dW, d_bias, dA, dB, None
        dX, dA, dB = lora_backward(
            dY2, x2, S, seed, A, B, W if needs[0] else None, ctx.spec, needs[3], needs[4]
        )
        if dX is not None:
            dX = dX.view(x.shape)
        dW = dY2.mT @ x2 if needs[1] else None
        return dX, dW, d_bias, dA, dB, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute ``y = x Wᵀ + scaling · drop(x) Aᵀ Bᵀ + bias``.

    Differentiable in x, weight, bias, A, B and a tensor scaling.

    Args:
        x: [..., K] floating.
        weight: [N, K].
        bias: [N] or None.
        A: [R, K].
        B: [N, R].
        scaling: Number or 0-d tensor.
        dropout_p: Probability of dropping an element of x in the low-rank branch; 0 in evaluation.
    """
    if (
        not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and not dropout_p
        and not isinstance(scaling, Tensor)
        and is_plain_eager(x.device.type)
    ):
        return _without_gradients(x, weight, bias, A, B, scaling)
    x, A, B, bias, spec = prepare(x, A, B, bias, scaling, dropout_p)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if torch.is_grad_enabled() and is_plain_eager(x.device.type):
        trained: Tensor = _LoRALinear.apply(x, weight, bias, A, B, spec)
        return trained
    with autocast_off(x.device.type):
        if in_functorch_transform():
            return F.linear(x, weight, bias) + lora_branch_by_torch(x, A, B, spec)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            y: Tensor = _LoRALinear.apply(x, weight, bias, A, B, spec)
            return y
        # As `apply_or_forward`, but a view is fine here; an autograd function must not return one.
        y, _, _ = _product(flatten_rows(x), weight, bias, A, B, spec)
        return y.view(*x.shape[:-1], y.shape[-1])


def _without_gradients(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """Compute what `_product` computes, without settings for a backward: generation runs it."""
    x2 = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y = add_low_rank_(F.linear(x2, W, bias), x2, A, B, scaling)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def add_low_rank_(y: Tensor, x2: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Add ``scaling · x Aᵀ Bᵀ`` to y [M, N] in place, in the dtype of A; no gradients."""
    S = scaled_linear(x2 if x2.dtype == A.dtype else x2.to(A.dtype), A, scaling)
    if S.dtype == y.dtype:
        return y.addmm_(S, B.mT)
    return y.add_(F.linear(S, B).to(y.dtype))
