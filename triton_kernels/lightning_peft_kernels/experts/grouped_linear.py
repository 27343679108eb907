"""Grouped linear layers for mixtures of experts: rows sorted by expert, one weight an expert.

    Y[rows of e] = X[rows of e] · W[e]ᵀ          X [S, K], W [E, N, K] dense or packed, Y [S, N]

Dense weights take `torch.nn.functional.grouped_mm`, which reads where groups end from a tensor: on
CUDA nothing waits for the host. It wants rows of whole 16 bytes; others are padded there and
multiplied one by one on a CPU, where few rows an expert go by `expert_pairs` and experts without
rows are passed over where most have none. A weight in another dtype, or packed, is made expert by
expert in a small buffer that is used again and again, in backward too, and only for experts that
have rows: no tensor of E·N·K elements arises. Without host counts (on CUDA) a packed weight is
decoded inside the product up to `backend.EXPERT_ROWS` rows an expert; above, the experts that have
rows are made in a buffer of E·N·K for the duration of the product.

Rows beyond the last group (expert-parallel sentinels) give zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import applied
from lightning_peft_kernels.experts.groups import Groups, Used, gradient, product
from lightning_peft_kernels.experts.on_the_fly_weights import MadeByExpert
from lightning_peft_kernels.nf4.ops import Packed4bit

__all__ = [
    "Groups",
    "grouped_linear",
    "grouped_linear_reference",
    "nf4_grouped_linear",
]


def grouped_linear_reference(X: Tensor, W: Tensor, expert: Tensor) -> Tensor:
    """The formula by gathering one weight a row; `expert` [S] int64."""
    return torch.einsum("sk,snk->sn", X, W[expert])


def grouped_linear(X: Tensor, W: Tensor, groups: Groups) -> Tensor:
    """Y [S, N] with X [S, K] sorted by expert and W [E, N, K].

    Differentiable in X and W; an expert without rows gets a zero gradient. A W in another dtype is
    cast to X's, expert by expert where nothing is trained in it.

    Raises:
        ValueError: another number of experts or rows than counted.
    """
    _check(X, groups, W.shape[0])
    if not W.requires_grad and W.dtype != X.dtype:
        y: Tensor = applied(MadeByExpert, X, groups, None, True, W)
        return y
    W = W.to(X.dtype)
    y = applied(_Grouped, X, W, *groups.given)
    return y


def nf4_grouped_linear(
    X: Tensor,
    q: Packed4bit,
    shape: tuple[int, int],
    groups: Groups,
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """`grouped_linear` with W packed expert by expert: every part of `q` has a leading expert
    axis.

    Differentiable in X alone. On the host experts with rows are dequantised, a few at a time;
    without host counts see `backend.choose_experts`.
    """
    _check(X, groups, q.packed.shape[0])
    packing = (shape, kind, block_size)
    y: Tensor = applied(MadeByExpert, X, groups, packing, True, *q)
    return y


class _Grouped(torch.autograd.Function):
    """All experts at once."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, offsets: Tensor, tail: bool, used: Used | None
    ) -> Tensor:
        needs_X, needs_W = ctx.needs_input_grad[:2]
        ctx.save_for_backward(X if needs_W else None, W if needs_X else None, offsets)
        ctx.tail, ctx.used = tail, used
        return product(X, W, offsets, tail, used)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        X, W, offsets = ctx.saved_tensors
        dX = None if W is None else product(dY, W.mT, offsets, ctx.tail, ctx.used)
        dW = None if X is None else gradient(dY, X, offsets, ctx.used)
        return dX, dW, None, None, None


def _check(X: Tensor, groups: Groups, experts: int) -> None:
    if groups.offsets.shape[0] != experts or groups.rows != X.shape[0]:
        raise ValueError(
            f"grouped_linear: expected groups of {experts} experts and {X.shape[0]} rows, got "
            f"{groups.offsets.shape[0]} experts and {groups.rows} rows; sort the rows first"
        )
