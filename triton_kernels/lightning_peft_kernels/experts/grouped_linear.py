"""Grouped linear layers for mixtures of experts: rows sorted by expert, one weight per expert.

    Y[rows of e] = X[rows of e] · W[e]ᵀ          X [S, K], W [E, N, K] dense or packed, Y [S, N]

Dense weights use `torch.nn.functional.grouped_mm`, which reads the ends of groups from a tensor, so
CUDA does not wait for the host. It needs rows of full 16 bytes: CUDA pads other shapes, a CPU
multiplies them one by one. A CPU also multiplies experts with few rows in pairs (`cpu_pairs`) and
skips idle experts if most are idle.

Weights that are packed or need a cast are dequantised a few experts at a time into a reused buffer,
in backward too, and only for experts with rows. No E×N×K tensor is allocated. If only the device
knows the counts (CUDA), the product decodes a packed weight on the fly where the chip allows it, up
to `selection.EXPERT_ROWS` rows per expert. Above that, the active experts are dequantised into a
temporary E×N×K buffer.

Rows beyond the last group (expert-parallel sentinels) give zeros.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, apply_or_forward
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from lightning_peft_kernels.dispatch import current_backend
from lightning_peft_kernels.experts.frozen_weights import FrozenWeight
from lightning_peft_kernels.experts.groups import ActiveExperts, GroupLayout, Groups
from lightning_peft_kernels.experts.on_the_fly_linear import OnTheFlyGroupedLinear
from lightning_peft_kernels.experts.products import grouped_product, grouped_weight_gradient
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing

__all__ = [
    "Groups",
    "block_grouped_linear",
    "grouped_linear",
    "grouped_linear_reference",
    "nf4_grouped_linear",
]


def grouped_linear_reference(X: Tensor, W: Tensor, expert: Tensor) -> Tensor:
    """Compute `grouped_linear` by gathering one weight per row; `expert` [S] int64."""
    return torch.einsum("sk,snk->sn", X, W[expert])


def grouped_linear(X: Tensor, W: Tensor, groups: Groups) -> Tensor:
    """Compute Y [S, N] from X [S, K] and W [E, N, K]; differentiable in X and W.

    A W in another dtype is cast to X's. If W is frozen, the cast runs a few experts at a time.

    Args:
        X: [S, K] floating, sorted by expert.
        W: [E, N, K]. An expert without rows gets a zero gradient.
        groups: Rows of each expert.

    Raises:
        ValueError: The number of experts or rows differs from `groups`.
    """
    _check(X, groups, W.shape[0])
    if not W.requires_grad and W.dtype != X.dtype:
        frozen = FrozenWeight((W,), None, current_backend())
        y: Tensor = apply_or_forward(OnTheFlyGroupedLinear, X, groups, frozen, True)
        return y
    W = W.to(X.dtype)
    y = apply_or_forward(_GroupedLinear, X, W, groups.layout)
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
    """Compute `grouped_linear` with W packed per expert; differentiable in X only.

    With counts on the host, the active experts are dequantised a few at a time; without, see
    `selection.select_experts`.

    Args:
        X: [S, K] floating, sorted by expert.
        q: Bytes of W; every part has a leading expert axis.
        shape: (N, K) of one expert.
        groups: Rows of each expert.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.

    Raises:
        ValueError: The number of experts or rows differs from `groups`.
    """
    _check(X, groups, q.packed.shape[0])
    frozen = FrozenWeight(tuple(q), Packing(shape, kind, block_size), current_backend())
    y: Tensor = apply_or_forward(OnTheFlyGroupedLinear, X, groups, frozen, True)
    return y


def block_grouped_linear(
    X: Tensor, q: BlockTensors, shape: tuple[int, int], layout: BlockLayout, groups: Groups
) -> Tensor:
    """Compute `grouped_linear` with W stored in blocks; differentiable in X only.

    At most a quarter of the experts is decoded at a time, in backward too. On CUDA the host waits
    for the counts once per product.

    Args:
        X: [S, K] floating, sorted by expert.
        q: What is stored of W; every part has a leading expert axis.
        shape: (N, K) of one expert.
        layout: Meaning of `q`.
        groups: Rows of each expert.

    Raises:
        ValueError: The number of experts or rows differs from `groups`.
    """
    _check(X, groups, q.codes.shape[0])
    frozen = FrozenWeight(tuple(q), Packing(shape, str(layout), 0), current_backend())
    y: Tensor = apply_or_forward(OnTheFlyGroupedLinear, X, groups, frozen, True)
    return y


class _Context(Context, Protocol):
    """What forward saves for backward."""

    has_unassigned_rows: bool
    active: ActiveExperts | None


class _GroupedLinear(KernelFunction):
    """X W[e]ᵀ with a dense W in the dtype of X."""

    @staticmethod
    def forward(ctx: _Context, X: Tensor, W: Tensor, layout: GroupLayout) -> Tensor:
        needs_X, needs_W = ctx.needs_input_grad[:2]
        ctx.save_for_backward(X if needs_W else None, W if needs_X else None, layout.offsets)
        ctx.has_unassigned_rows, ctx.active = layout.has_unassigned_rows, layout.active
        return grouped_product(X, W, layout)

    @staticmethod
    def backward(ctx: _Context, dY: Tensor) -> Grads:
        X, W, offsets = ctx.saved_tensors
        layout = GroupLayout(offsets, ctx.has_unassigned_rows, ctx.active)
        dX = None if W is None else grouped_product(dY, W.mT, layout)
        dW = None if X is None else grouped_weight_gradient(dY, X, layout)
        return dX, dW, None


def _check(X: Tensor, groups: Groups, experts: int) -> None:
    if groups.offsets.shape[0] != experts or groups.rows != X.shape[0]:
        raise ValueError(
            f"grouped_linear: expected groups of {experts} experts and {X.shape[0]} rows, got "
            f"{groups.offsets.shape[0]} experts and {groups.rows} rows; sort the rows first"
        )
