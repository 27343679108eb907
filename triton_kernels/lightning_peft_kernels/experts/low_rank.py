"""One low rank per expert, added onto a grouped product: y + s · X A[e]ᵀ B[e]ᵀ.

Shapes: y [S, N], X [S, K] sorted by expert, A [E, R, K], B [E, N, R]. Z = s · X A[e]ᵀ [S, R] is
saved. The backward is written by hand:
    dZ = s · dY B[e]      dB[e] = dYᵀ Z      dA[e] = dZᵀ X      dX = dZ A[e]      by rows of e

A GPU adds the second product in place, which saves two passes over [S, N], and computes dZ and dB
in one pass over dY, up to the rank of `select_one_pass`. A CPU cuts few rows per expert
into blocks (`row_blocks`): one batched product instead of one call per expert. Other cases use
library products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import (
    Context,
    Grads,
    KernelFunction,
    apply_or_forward,
    check_no_double_backward,
    gradients_of,
    is_double_backward,
)
from lightning_peft_kernels.dispatch import Backend, current_backend
from lightning_peft_kernels.experts.groups import ActiveExperts, GroupLayout, Groups
from lightning_peft_kernels.experts.products import grouped_product, grouped_weight_gradient
from lightning_peft_kernels.experts.row_blocks import RowBlocks
from lightning_peft_kernels.launch import attempt
from lightning_peft_kernels.lora.selection import rank_detail, select_one_pass

__all__ = ["add_low_rank", "add_low_rank_reference"]

T = TypeVar("T")


def add_low_rank_reference(
    y: Tensor, X: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, expert: Tensor
) -> Tensor:
    """Compute `add_low_rank` by gathering one pair per row; `expert` [S] int64."""
    Z = torch.einsum("sk,srk->sr", X, A[expert]) * scaling
    return y + torch.einsum("sr,snr->sn", Z, B[expert])


class _Spec(NamedTuple):
    scaling: float
    in_place: bool
    backend: Backend


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
    """Compute ``y + scaling · X A[e]ᵀ B[e]ᵀ`` in the dtype of y [S, N].

    Differentiable in y, X, A, B and a tensor scaling.

    Args:
        y: [S, N].
        X: [S, K], rows sorted by expert; cast to A's dtype.
        A: [E, R, K].
        B: [E, N, R].
        scaling: Number or 0-d tensor.
        groups: Rows of each expert; unassigned rows keep their y.
        in_place: If True, y may be overwritten.
    """
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling.to(B.dtype), 1.0
    # Never in place while compiling, see `autograd.add_maybe_inplace`. A padded product is a view.
    in_place = in_place and not torch.compiler.is_compiling() and not y._is_view()
    spec = _Spec(scaling, in_place, current_backend())
    X, blocks = X.to(A.dtype), groups.blocks(A, B)
    if blocks is not None:
        out: Tensor = apply_or_forward(_AddByBlocks, y, X, A, B, blocks, spec)
        return out
    out = apply_or_forward(_AddLowRank, y, X, A, B, groups.layout, spec)
    return out


class _LowRankContext(Context, Protocol):
    """What forward saves for backward."""

    spec: _Spec


class _ProductContext(_LowRankContext, Protocol):
    """What forward saves for backward."""

    has_unassigned_rows: bool
    active: ActiveExperts | None


class _AddLowRank(KernelFunction):
    """One product per expert."""

    @staticmethod
    def forward(
        ctx: _ProductContext,
        y: Tensor,
        X: Tensor,
        A: Tensor,
        B: Tensor,
        layout: GroupLayout,
        spec: _Spec,
    ) -> Tensor:
        Z = grouped_product(X, A, layout).contiguous()
        if spec.scaling != 1.0:
            Z *= spec.scaling
        ctx.save_for_backward(X if ctx.needs_input_grad[2] else None, Z, A, B, layout.offsets)
        ctx.spec = spec
        ctx.has_unassigned_rows, ctx.active = layout.has_unassigned_rows, layout.active
        if spec.in_place:
            ctx.mark_dirty(y)

        def by_kernel() -> Tensor:
            from lightning_peft_kernels.experts.low_rank_triton import add_low_rank_product_

            return add_low_rank_product_(y, Z, B.contiguous(), layout.offsets)

        def by_products() -> Tensor:
            low = grouped_product(Z, B, layout).to(y.dtype)
            return y.add_(low) if spec.in_place else y + low

        if not spec.in_place or y.dtype != Z.dtype:
            return by_products()
        return _run(_ADD, Z, spec.backend, by_kernel, by_products)

    @staticmethod
    def backward(ctx: _ProductContext, dY: Tensor) -> Grads:
        X, Z, A, B, offsets = ctx.saved_tensors
        spec = ctx.spec
        needs_X, needs_A, needs_B = ctx.needs_input_grad[1:4]
        layout = GroupLayout(offsets, ctx.has_unassigned_rows, ctx.active)
        if is_double_backward():

            def product(X: Tensor, W: Tensor) -> Tensor:
                return grouped_product(X, W, layout)

            return dY, *_gradients_by_torch(product, ctx, dY, X, A, B), None, None
        g = dY.to(Z.dtype)
        dX = dA = None

        def by_kernel() -> tuple[Tensor | None, Tensor | None]:
            from lightning_peft_kernels.experts.low_rank_triton import expert_low_rank_gradients

            return expert_low_rank_gradients(
                g.contiguous(), Z, B.contiguous(), offsets, spec.scaling
            )

        def by_products() -> tuple[Tensor | None, Tensor | None]:
            dZ = None
            if needs_X or needs_A:
                dZ = grouped_product(g, B.mT, layout)
                if spec.scaling != 1.0:
                    dZ *= spec.scaling
            return dZ, grouped_weight_gradient(g, Z, layout) if needs_B else None

        both = needs_B and (needs_X or needs_A)
        dZ, dB = (
            _run(_GRADIENTS, Z, spec.backend, by_kernel, by_products) if both else by_products()
        )
        if dZ is not None:
            dA = grouped_weight_gradient(dZ, X, layout) if needs_A else None
            dX = grouped_product(dZ, A.mT, layout) if needs_X else None
        return dY, dX, dA, dB, None, None


class _BlocksContext(_LowRankContext, Protocol):
    """What forward saves for backward."""

    blocks: RowBlocks


class _AddByBlocks(KernelFunction):
    """One product per block. Padding of Z and dZ is zero, so other padding needs no care."""

    @staticmethod
    def forward(
        ctx: _BlocksContext,
        y: Tensor,
        X: Tensor,
        A: Tensor,
        B: Tensor,
        blocks: RowBlocks,
        spec: _Spec,
    ) -> Tensor:
        Z = torch.bmm(blocks.cut(X), blocks.weights(A).mT)
        if spec.scaling != 1.0:
            Z *= spec.scaling
        Z.masked_fill_(blocks.padding, 0.0)
        ctx.save_for_backward(X if ctx.needs_input_grad[2] else None, Z, A, B)
        ctx.spec, ctx.blocks = spec, blocks
        low = blocks.joined(torch.bmm(Z, blocks.weights(B).mT)).to(y.dtype)
        if spec.in_place:
            ctx.mark_dirty(y)
        return y.add_(low) if spec.in_place else y + low

    @staticmethod
    def backward(ctx: _BlocksContext, dY: Tensor) -> Grads:
        X, Z, A, B = ctx.saved_tensors
        blocks, spec = ctx.blocks, ctx.spec
        needs_X, needs_A, needs_B = ctx.needs_input_grad[1:4]
        if is_double_backward():

            def product(X: Tensor, W: Tensor) -> Tensor:
                return blocks.joined(torch.bmm(blocks.cut(X), blocks.weights(W).mT))

            return dY, *_gradients_by_torch(product, ctx, dY, X, A, B), None, None
        g = blocks.cut(dY.to(Z.dtype))
        dX = dA = dB = None
        if needs_B:
            dB = blocks.summed(_up_gradient(g, Z), len(B))
        if needs_X or needs_A:
            dZ = _down(g, blocks.weights(B))
            if spec.scaling != 1.0:
                dZ *= spec.scaling
            dZ.masked_fill_(blocks.padding, 0.0)
            if needs_A:
                dA = blocks.summed(torch.bmm(dZ.mT, blocks.cut(X)), len(A))
            if needs_X:
                dX = blocks.joined(torch.bmm(dZ, blocks.weights(A)))
        return dY, dX, dA, dB, None, None


# If rows of the result are shorter than a vector register, the library takes up to three times as
# long as for the transposed result (MKL on Zen 5, fp32, ranks 4 and 8; neither in bf16 nor from
# rank 16 on).
_VECTOR = 16


def _is_narrow(B: Tensor) -> bool:
    return B.dtype == torch.float32 and B.shape[-1] < _VECTOR


def _down(g: Tensor, B: Tensor) -> Tensor:
    """Compute ``g B`` [blocks, height, R]."""
    if _is_narrow(B) and g.shape[1] >= _VECTOR:
        return torch.bmm(B.mT, g.mT).mT
    return torch.bmm(g, B)


def _up_gradient(g: Tensor, Z: Tensor) -> Tensor:
    """Compute ``gᵀ Z`` [blocks, N, R]."""
    if _is_narrow(Z):
        return torch.bmm(Z.mT, g).mT.contiguous()
    return torch.bmm(g.mT, Z)


def _gradients_by_torch(
    product: Callable[[Tensor, Tensor], Tensor],
    ctx: _LowRankContext,
    dY: Tensor,
    X: Tensor | None,
    A: Tensor,
    B: Tensor,
) -> list[Tensor | None]:
    """Return (dX, dA, dB) that are differentiable."""
    if X is None:
        check_no_double_backward("add_low_rank", "train A too, without which X is not kept")
    assert X is not None  # the check above raised

    def formula(X: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return product(product(X, A) * ctx.spec.scaling, B).to(dY.dtype)

    return gradients_of(formula, (X, A, B), ctx.needs_input_grad[1:4], dY)


_ADD, _GRADIENTS = "expert_low_rank", "expert_rank_gradients"


def _run(
    op: str, Z: Tensor, backend: Backend, by_kernel: Callable[[], T], by_products: Callable[[], T]
) -> T:
    """Run the kernel if it is selected; not while compiling, where a trace records ops only."""
    if not Z.shape[0] or torch.compiler.is_compiling():
        return by_products()
    rank = Z.shape[1]
    if select_one_pass(Z.device, Z.dtype, rank, backend, op).backend == "torch":
        return by_products()
    return attempt(op, Z.dtype, rank_detail(rank), Z.device, backend, by_kernel, by_products)
