"""Linear layer with a block-scaled base.

    y = x Wᵀ + bias

Shapes: x [..., K], W [N, K] stored. Forward decodes W into a buffer; backward decodes it again for
dX = dY W. Nothing of W's size is kept between them.
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
    apply_or_forward,
    autocast_off,
    flatten_rows,
    in_functorch_transform,
    unflatten_rows,
)
from lightning_peft_kernels.block_scaled.decode import decode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from lightning_peft_kernels.dispatch import Backend, current_backend
from lightning_peft_kernels.nf4.weight_buffers import thread_buffer

__all__ = ["block_linear"]


class _Weight(Protocol):
    """How a product reads its weight."""

    shape: tuple[int, int]
    layout: BlockLayout
    backend: Backend


class _Context(Context, _Weight, Protocol):
    """What forward saves for backward."""


class _BlockLinear(KernelFunction):
    """y = x Wᵀ + bias."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        bias: Tensor | None,
        q: BlockTensors,
        shape: tuple[int, int],
        layout: BlockLayout,
        backend: Backend,
    ) -> Tensor:
        W = _for_product(q, shape, layout, x.dtype, backend)
        ctx.save_for_backward(*q)
        ctx.shape, ctx.layout, ctx.backend = shape, layout, backend
        return unflatten_rows(torch.nn.functional.linear(flatten_rows(x), W, bias), x)

    @staticmethod
    def backward(ctx: _Context, dY: Tensor) -> Grads:
        dX = d_bias = None
        if ctx.needs_input_grad[0]:
            q = BlockTensors(*ctx.saved_tensors)
            dX = dY @ _for_product(q, ctx.shape, ctx.layout, dY.dtype, ctx.backend)
        if ctx.needs_input_grad[1]:
            d_bias = dY.reshape(-1, dY.shape[-1]).sum(0)
        return dX, d_bias, None, None, None, None


def _for_product(
    q: BlockTensors,
    shape: tuple[int, int],
    layout: BlockLayout,
    dtype: torch.dtype,
    backend: Backend,
) -> Tensor:
    """Return W for a product that follows at once; the next call may overwrite it."""
    out = None
    plain = type(q.codes) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    # A recorded product (create_graph) keeps its weight, so it must not be overwritten.
    if plain and not torch.is_grad_enabled() and q.codes.device.type == "cpu":
        out = thread_buffer(shape[0] * shape[1], dtype).view(shape)
    return decode_blocks(q, shape, layout, dtype, out=out, backend=backend)


def block_linear(
    x: Tensor,
    q: BlockTensors,
    shape: Sequence[int],
    layout: BlockLayout,
    bias: Tensor | None,
) -> Tensor:
    """Compute ``y = x Wᵀ + bias`` with W [N, K] stored in blocks; differentiable in x and bias.

    Runs in the dtype of autocast if it is on, else in the dtype of x.

    Args:
        x: [..., K] floating.
        q: What is stored of W.
        shape: [N, K].
        layout: Meaning of `q`.
        bias: [N] or None.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    bias = None if bias is None else bias.to(x.dtype)
    size = (int(shape[0]), int(shape[1]))
    with autocast_off(device):
        if in_functorch_transform():
            return torch.nn.functional.linear(x, decode_blocks(q, size, layout, x.dtype), bias)
        y: Tensor = apply_or_forward(_BlockLinear, x, bias, q, size, layout, current_backend())
    return y
