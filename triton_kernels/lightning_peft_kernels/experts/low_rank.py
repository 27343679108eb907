"""One low rank an expert, added onto a grouped product: y + s · X A[e]ᵀ B[e]ᵀ, by hand both ways.

Shapes: y [S, N], X [S, K] sorted by expert, A [E, R, K], B [E, N, R]; Z = s · X A[e]ᵀ [S, R] is
saved.
    dZ = s · dY B[e]      dB[e] = dYᵀ Z      dA[e] = dZᵀ X      dX = dZ A[e]      by rows of e
On a GPU the second product is added in place, without writing it out (two passes over [S, N] less),
and dZ and dB come from one pass over dY, up to the rank of `backend.choose_one_pass`. On a CPU
few rows an expert are cut into blocks (`expert_groups.Blocks`), each with its expert's factors:
one batched product where a product for each expert would cost a call for every few rows. Elsewhere
they are library products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import applied, gradients_of, recording, refuse_recording
from lightning_peft_kernels.dispatch import choose_one_pass
from lightning_peft_kernels.experts.groups import Blocks, Groups, Used, gradient, product

__all__ = ["add_low_rank", "add_low_rank_reference"]


def add_low_rank_reference(
    y: Tensor, X: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, expert: Tensor
) -> Tensor:
    """The formula by gathering one pair a row; `expert` [S] int64."""
    Z = torch.einsum("sk,srk->sr", X, A[expert]) * scaling
    return y + torch.einsum("sr,snr->sn", Z, B[expert])


def add_low_rank(
    y: Tensor,
    X: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    groups: Groups,
    *,
    in_place: bool = False,
) -> Tensor:
    """Y + scaling · X A[e]ᵀ B[e]ᵀ in the dtype of y [S, N]; differentiable in y, X, A, B and a
    tensor scaling.

    Args:
        y: [S, N].
        X: [S, K], rows sorted by expert; cast to A's dtype.
        A: [E, R, K].
        B: [E, N, R].
        scaling: Number or 0-d tensor.
        groups: Rows of each expert; those of nobody keep their y.
        in_place: Whether y may be written over.
    """
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling.to(B.dtype), 1.0
    # While compiling not in place: see `calling.added`. A padded product is seen through a view.
    in_place = in_place and not torch.compiler.is_compiling() and not y._is_view()
    X, blocks = X.to(A.dtype), groups.blocks(A, B)
    if blocks is not None:
        out: Tensor = applied(_AddByBlocks, y, X, A, B, scaling, in_place, blocks)
        return out
    out = applied(_AddLowRank, y, X, A, B, scaling, in_place, *groups.given)
    return out


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        X: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        in_place: bool,
        offsets: Tensor,
        tail: bool,
        used: Used | None,
    ) -> Tensor:
        Z = product(X, A, offsets, tail, used).contiguous()
        if scaling != 1.0:
            Z *= scaling
        ctx.save_for_backward(X if ctx.needs_input_grad[2] else None, Z, A, B, offsets)
        ctx.scaling, ctx.tail, ctx.used = scaling, tail, used
        if in_place:
            ctx.mark_dirty(y)
        if in_place and y.dtype == Z.dtype and _by_kernel(Z, offsets):
            from lightning_peft_kernels.experts.low_rank_triton import add_up

            return add_up(y, Z, B.contiguous(), offsets)
        low = product(Z, B, offsets, tail, used).to(y.dtype)
        return y.add_(low) if in_place else y + low

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        X, Z, A, B, offsets = ctx.saved_tensors
        needs_X, needs_A, needs_B = ctx.needs_input_grad[1:4]
        if recording():

            def product_of(X: Tensor, W: Tensor) -> Tensor:
                return product(X, W, offsets, ctx.tail, ctx.used)

            return dY, *_again(product_of, ctx, dY, X, A, B), None, None, None, None, None
        g, used = dY.to(Z.dtype), ctx.used
        dX = dA = dB = dZ = None
        if needs_B and (needs_X or needs_A) and _by_kernel(Z, offsets):
            from lightning_peft_kernels.experts.low_rank_triton import gradients

            dZ, dB = gradients(g.contiguous(), Z, B.contiguous(), offsets, ctx.scaling)
        else:
            if needs_X or needs_A:
                dZ = product(g, B.mT, offsets, ctx.tail, used)
                if ctx.scaling != 1.0:
                    dZ *= ctx.scaling
            dB = gradient(g, Z, offsets, used) if needs_B else None
        if dZ is not None:
            dA = gradient(dZ, X, offsets, used) if needs_A else None
            dX = product(dZ, A.mT, offsets, ctx.tail, used) if needs_X else None
        return dY, dX, dA, dB, None, None, None, None, None


class _AddByBlocks(torch.autograd.Function):
    """Z and dZ are kept in blocks, zero where those are filled up: other fillers need no care."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        X: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        in_place: bool,
        blocks: Blocks,
    ) -> Tensor:
        Z = torch.bmm(blocks.cut(X), blocks.of_each(A).mT)
        if scaling != 1.0:
            Z *= scaling
        Z.masked_fill_(blocks.filler, 0.0)
        ctx.save_for_backward(X if ctx.needs_input_grad[2] else None, Z, A, B)
        ctx.scaling, ctx.blocks = scaling, blocks
        low = blocks.joined(torch.bmm(Z, blocks.of_each(B).mT)).to(y.dtype)
        if in_place:
            ctx.mark_dirty(y)
        return y.add_(low) if in_place else y + low

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        X, Z, A, B = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        needs_X, needs_A, needs_B = ctx.needs_input_grad[1:4]
        if recording():

            def product(X: Tensor, W: Tensor) -> Tensor:
                return blocks.joined(torch.bmm(blocks.cut(X), blocks.of_each(W).mT))

            return dY, *_again(product, ctx, dY, X, A, B), None, None, None
        g = blocks.cut(dY.to(Z.dtype))
        dX = dA = dB = None
        if needs_B:
            dB = blocks.summed(_up_gradient(g, Z), len(B))
        if needs_X or needs_A:
            dZ = _down(g, blocks.of_each(B))
            if ctx.scaling != 1.0:
                dZ *= ctx.scaling
            dZ.masked_fill_(blocks.filler, 0.0)
            if needs_A:
                dA = blocks.summed(torch.bmm(dZ.mT, blocks.cut(X)), len(A))
            if needs_X:
                dX = blocks.joined(torch.bmm(dZ, blocks.of_each(A)))
        return dY, dX, dA, dB, None, None, None


# A result whose rows are shorter than a vector register takes the library up to three times as long
# as the same result transposed (MKL on Zen 5, fp32, ranks 4 and 8; not in bf16, not from rank 16
# on).
_VECTOR = 16


def _narrow(B: Tensor) -> bool:
    return B.dtype == torch.float32 and B.shape[-1] < _VECTOR


def _down(g: Tensor, B: Tensor) -> Tensor:
    """G B [blocks, height, R]."""
    if _narrow(B) and g.shape[1] >= _VECTOR:
        return torch.bmm(B.mT, g.mT).mT
    return torch.bmm(g, B)


def _up_gradient(g: Tensor, Z: Tensor) -> Tensor:
    """Gᵀ Z [blocks, N, R]."""
    if _narrow(Z):
        return torch.bmm(Z.mT, g).mT.contiguous()
    return torch.bmm(g.mT, Z)


def _again(
    product: Callable[[Tensor, Tensor], Tensor],
    ctx: Any,
    dY: Tensor,
    X: Tensor | None,
    A: Tensor,
    B: Tensor,
) -> list[Tensor | None]:
    """(dX, dA, dB) that can be differentiated again."""
    if X is None:
        refuse_recording("add_low_rank", "train A too, without which X is not kept")
    assert X is not None  # or it was refused

    def formula(X: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return product(product(X, A) * ctx.scaling, B).to(dY.dtype)

    return gradients_of(formula, (X, A, B), ctx.needs_input_grad[1:4], dY)


def _by_kernel(Z: Tensor, offsets: Tensor) -> bool:
    """Not while compiling: what a trace records must be an op."""
    if not Z.shape[0] or torch.compiler.is_compiling():
        return False
    return choose_one_pass(Z.device, Z.dtype, Z.shape[1]).backend == "triton"
