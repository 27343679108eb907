"""LoRA on a dense linear layer: y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias, forward and backward by hand.

Shapes: x [..., K], W [N, K] frozen or trained, A [R, K], B [N, R]; M = rows of x.
S = drop(x) Aᵀ [M, R] is saved, not recomputed (unlike the usual fast algorithm, which reads x twice
more); of dropout only the seed is saved, and backward draws the mask again. The scale sits on the
rank side, M·R elements instead of M·N. dS = s · dY B and dB = dYᵀ S come from one pass over dY
where there is a kernel for it (`rank_gradients`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft_kernels.autograd import (
    add_product,
    autocast_off,
    flat,
    gradients_of,
    recording,
    transformed,
    unflat,
)
from lightning_peft_kernels.dropout.ops import draw_seed, seeded_dropout
from lightning_peft_kernels.lora.rank_gradients import rank_gradients

__all__ = ["Plan", "lora_linear", "lora_linear_reference"]


class Plan(NamedTuple):
    """What forward and backward agree on.

    Attributes:
        scaling: s, a number; a tensor scale is folded into B before.
        dropout_p: Probability of dropping.
        dtype: Of the rank-sized products.
    """

    scaling: float
    dropout_p: float
    dtype: torch.dtype


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float | Tensor
) -> Tensor:
    """The formula in plain torch, without dropout."""
    return F.linear(x, weight, bias) + (x.to(A.dtype) @ A.mT @ B.mT * scaling).to(x.dtype)


def prepare(
    x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float | Tensor, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Plan]:
    """Cast by the one dtype rule: autocast's dtype where it is on; else rank products in the
    adapters' dtype.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, A, B = (
            x.to(dtype),
            A.to(dtype),
            B.to(dtype),
        )  # differentiable: gradients return in the parameters' dtype
    else:
        dtype = A.dtype
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling.to(B.dtype), 1.0
    return x, A, B, bias, Plan(float(scaling), dropout_p, dtype)


def lora_down(x2: Tensor, A: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """(S = s · drop(x) Aᵀ [M, R], seed of the dropout or None)."""
    z, seed = x2 if x2.dtype == plan.dtype else x2.to(plan.dtype), None
    if plan.dropout_p:
        seed = draw_seed(x2.device)
        z = seeded_dropout(z, seed, plan.dropout_p)
    S = F.linear(z, A)
    return (S if plan.scaling == 1.0 else S * plan.scaling), seed


def plain_branch(x: Tensor, A: Tensor, B: Tensor, plan: Plan, seed: Tensor | None = None) -> Tensor:
    """s · drop(x) Aᵀ Bᵀ [..., N] in torch's own operations: with the mask of `seed`, without one
    with a mask of torch's.
    """
    z, p = x.to(plan.dtype), plan.dropout_p
    z = F.dropout(z, p) if seed is None else seeded_dropout(z, seed, p)
    return F.linear(F.linear(z, A) * plan.scaling, B).to(x.dtype)


def lora_branch(
    x2: Tensor, A: Tensor, B: Tensor, plan: Plan, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(s · drop(x) Aᵀ Bᵀ [M, N], S [M, R], seed or None)."""
    S, seed = lora_down(x2, A, plan)
    y = F.linear(S, B)
    return (y if y.dtype == out_dtype else y.to(out_dtype)), S, seed


def lora_up_backward(dS: Tensor, A: Tensor, seed: Tensor | None, plan: Plan) -> Tensor:
    """What the branch adds to dX: drop(dS A) [M, K], with the mask of forward."""
    low = dS @ A
    return low if seed is None else seeded_dropout(low, seed, plan.dropout_p)


def rank_backward(
    dY: Tensor,
    x2: Tensor | None,
    S: Tensor,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    plan: Plan,
    needs_A: bool,
    needs_B: bool,
    needs_X: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dS, dA, dB), each None where nothing asks for it; S carries the scale already, x2 is read
    for dA alone.
    """
    g = dY if dY.dtype == plan.dtype else dY.to(plan.dtype)
    dS = dA = dB = None
    if needs_B and (needs_A or needs_X):
        dS, dB = rank_gradients(g, S, B, plan.scaling)
    elif needs_B:
        dB = g.mT @ S
    elif needs_A or needs_X:
        dS = g @ B if plan.scaling == 1.0 else (g @ B) * plan.scaling
    if needs_A and dS is not None and x2 is not None:
        z = x2 if x2.dtype == plan.dtype else x2.to(plan.dtype)
        dA = dS.mT @ (z if seed is None else seeded_dropout(z, seed, plan.dropout_p))
    return dS, dA, dB


def lora_backward(
    dY: Tensor,
    x2: Tensor,
    S: Tensor,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    W: Tensor | None,
    plan: Plan,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX or None where W is None, dA, dB)."""
    dX = None
    dS, dA, dB = rank_backward(dY, x2, S, seed, A, B, plan, needs_A, needs_B, W is not None)
    if W is not None and dS is not None:
        dX = torch.addmm(lora_up_backward(dS, A, seed, plan).to(dY.dtype), dY, W)
    return dX, dA, dB


def _product(
    x2: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(Y [M, N], S [M, R], seed or None)."""
    # The base first, as the plain layer runs it: with B = 0 not a bit differs.
    y = F.linear(x2, W, bias)
    S, seed = lora_down(x2, A, plan)
    if plan.dtype == y.dtype:
        return add_product(y, S, B.mT), S, seed
    return y + F.linear(S, B).to(y.dtype), S, seed


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        plan: Plan,
    ) -> Tensor:
        x2 = flat(x)
        y, S, seed = _product(x2, W, bias, A, B, plan)
        ctx.save_for_backward(x, S, seed, A, B, W)
        ctx.plan = plan
        return unflat(y, x)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        x, S, seed, A, B, W = ctx.saved_tensors
        x2, dY2 = flat(x), flat(dY)
        needs = ctx.needs_input_grad
        d_bias = dY2.sum(0) if needs[2] else None
        if recording():

            def formula(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
                return F.linear(x, W) + plain_branch(x, A, B, ctx.plan, seed)

            wanted = [*needs[:2], *needs[3:5]]
            dX, dW, dA, dB = gradients_of(formula, (x, W, A, B), wanted, dY)
            return dX, dW, d_bias, dA, dB, None
        dX, dA, dB = lora_backward(
            dY2, x2, S, seed, A, B, W if needs[0] else None, ctx.plan, needs[3], needs[4]
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
    training: bool = True,
) -> Tensor:
    """Y = x Wᵀ + scaling · drop(x) Aᵀ Bᵀ + bias; differentiable in all of x, weight, bias, A, B.

    Args:
        x: [..., K] floating.
        weight: [N, K].
        bias: [N] or None.
        A: [R, K].
        B: [N, R].
        scaling: Number or 0-d tensor.
        dropout_p: Probability of dropping an element of x in the low-rank branch.
        training: Whether dropout is on.
    """
    x, A, B, bias, plan = prepare(x, A, B, bias, scaling, dropout_p if training else 0.0)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    with autocast_off(x.device.type):
        if transformed():
            return F.linear(x, weight, bias) + plain_branch(x, A, B, plan)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            y: Tensor = _LoRALinear.apply(x, weight, bias, A, B, plan)  # type: ignore[no-untyped-call]
            return y
        # As `calling.applied`; but a view will do here, which an autograd function must not return.
        y, _, _ = _product(flat(x), weight, bias, A, B, plan)
        return y.view(*x.shape[:-1], y.shape[-1])
