"""Grouped linear layers for mixtures of experts: rows sorted by expert, one weight an expert.

    Y[rows of e] = X[rows of e] · W[e]ᵀ          X [S, K], W [E, N, K] dense or packed, Y [S, N]

Only experts that have rows are touched: at few tokens the cost does not grow with E. A packed
expert is dequantised for its own product and dropped, in backward again. Rows beyond the last group
(expert-parallel sentinels) give zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.nf4 import Packed4bit, dequantize_4bit

__all__ = ["grouped_linear", "grouped_linear_reference", "nf4_grouped_linear"]


def grouped_linear_reference(X: Tensor, W: Tensor, expert: Tensor) -> Tensor:
    """The formula by gathering one weight a row; `expert` [S] int64."""
    return torch.einsum("sk,snk->sn", X, W[expert])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(X, W)
        ctx.counts = counts
        Y = X.new_zeros(X.shape[0], W.shape[1])
        for e, start, stop in _groups(counts):
            torch.mm(X[start:stop], W[e].mT, out=Y[start:stop])
        return Y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        X, W = ctx.saved_tensors
        dX = torch.zeros_like(X) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        for e, start, stop in _groups(ctx.counts):
            g = dY[start:stop]
            if dX is not None:
                torch.mm(g, W[e], out=dX[start:stop])
            if dW is not None:
                torch.mm(g.mT, X[start:stop], out=dW[e])
        return dX, dW, None


class _NF4GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, int],
        kind: str,
        block_size: int,
        counts: list[int],
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax, absmax2, offset)
        ctx.packing, ctx.counts = (shape, kind, block_size), counts
        q = Packed4bit(packed, absmax, absmax2, offset)
        Y = X.new_zeros(X.shape[0], shape[0])
        for e, start, stop in _groups(counts):
            W = _expert(q, e, shape, X.dtype, kind, block_size)
            torch.mm(X[start:stop], W.mT, out=Y[start:stop])
        return Y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        dX = None
        if ctx.needs_input_grad[0]:
            shape, kind, block_size = ctx.packing
            q = Packed4bit(*ctx.saved_tensors)
            dX = dY.new_zeros(dY.shape[0], shape[1])
            for e, start, stop in _groups(ctx.counts):
                W = _expert(q, e, shape, dY.dtype, kind, block_size)
                torch.mm(dY[start:stop], W, out=dX[start:stop])
        return dX, None, None, None, None, None, None, None, None


def _groups(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of the experts that have rows."""
    groups, start = [], 0
    for e, n in enumerate(counts):
        if n:
            groups.append((e, start, start + n))
            start += n
    return groups


def _expert(
    q: Packed4bit, e: int, shape: tuple[int, int], dtype: torch.dtype, kind: str, block_size: int
) -> Tensor:
    one = Packed4bit(
        q.packed[e],
        q.absmax[e],
        None if q.absmax2 is None else q.absmax2[e],
        None if q.offset is None else q.offset[e].reshape(1),
    )
    return dequantize_4bit(one, shape, dtype, kind=kind, block_size=block_size)


def grouped_linear(X: Tensor, W: Tensor, counts: list[int]) -> Tensor:
    """Y [S, N] with X [S, K] sorted by expert, W [E, N, K] and the number of rows of each expert.

    Differentiable in X and W; an expert without rows gets a zero gradient.

    Raises:
        ValueError: more experts or rows are counted than there are.
    """
    _check(X, counts, W.shape[0])
    y: Tensor = _GroupedLinear.apply(X, W, counts)  # type: ignore[no-untyped-call]
    return y


def nf4_grouped_linear(
    X: Tensor,
    q: Packed4bit,
    shape: tuple[int, int],
    counts: list[int],
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """`grouped_linear` with W packed expert by expert: every part of `q` has a leading expert
    axis.
    """
    _check(X, counts, q.packed.shape[0])
    y: Tensor = _NF4GroupedLinear.apply(X, *q, shape, kind, block_size, counts)  # type: ignore[no-untyped-call]
    return y


def _check(X: Tensor, counts: list[int], experts: int) -> None:
    if len(counts) != experts or sum(counts) > X.shape[0]:
        raise ValueError(
            f"grouped_linear: expected counts for {experts} experts with at most {X.shape[0]} "
            f"rows, got {len(counts)} counts and {sum(counts)} rows"
        )
