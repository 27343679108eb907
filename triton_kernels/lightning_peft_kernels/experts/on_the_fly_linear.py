"""Grouped products whose weights are dequantised or cast for the product.

With counts on the host, a few active experts at a time are written to one buffer, in forward and
backward. If only the device knows the counts, the product decodes a packed weight on the fly. With
many rows per expert, the active experts are dequantised into one buffer instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, apply_or_forward
from lightning_peft_kernels.dispatch import Backend
from lightning_peft_kernels.experts.cpu_batches import ExpertBatches
from lightning_peft_kernels.experts.frozen_weights import FrozenWeight, WeightSource
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.nf4.packed import Packing
from lightning_peft_kernels.nf4.weight_buffers import thread_buffer
from lightning_peft_kernels.registration import define_op

__all__ = ["OnTheFlyGroupedLinear"]

# Elements of the CPU buffer for dequantised experts. Several small experts share the cost of a call
# and stay in the cache (twice the size took 1.01 to 1.06 of a step's time, a quarter 1.01 to 1.04).
# The buffer never holds more than a quarter of the experts.
_BUFFER = 1 << 20
# Experts per slab from which, and mean rows per expert (by bytes per element) up to which, batched
# products pay for ordering rows: 0.8 to 1.03 of the time in fp32, 0.5 to 0.6 in bf16 (2 threads, 64
# and 256 experts of 256 × 256 and 256 × 128).
_SIDE_BY_SIDE = 4
_FEW_ROWS = {2: 32, 4: 24, 8: 24}


class _Context(Context, Protocol):
    """What forward saves for backward."""

    groups: Groups
    transposed: bool
    packing: Packing | None
    backend: Backend


class OnTheFlyGroupedLinear(KernelFunction):
    """X W[e]ᵀ, or X W[e] if not `transposed`, with weights written for the product."""

    @staticmethod
    def forward(
        ctx: _Context, X: Tensor, groups: Groups, weight: FrozenWeight, transposed: bool
    ) -> Tensor:
        """Compute Y [S, N]."""
        ctx.save_for_backward(*weight.tensors)
        ctx.groups, ctx.transposed = groups, transposed
        ctx.packing, ctx.backend = weight.packing, weight.backend
        return _product(X, groups, weight, transposed=transposed)

    @staticmethod
    def backward(ctx: _Context, dY: Tensor) -> Grads:
        """Compute dX, the same product in the other direction; the weight is frozen.

        A double backward records this product, which writes its weights again.
        """
        tensors = ctx.saved_tensors  # read once: a checkpoint recomputes them at every access
        dX = None
        if ctx.needs_input_grad[0]:
            weight = FrozenWeight(tuple(tensors), ctx.packing, ctx.backend)
            dX = apply_or_forward(
                OnTheFlyGroupedLinear, dY.contiguous(), ctx.groups, weight, not ctx.transposed
            )
        return dX, None, None, None


def _product(X: Tensor, groups: Groups, weight: FrozenWeight, *, transposed: bool) -> Tensor:
    if not torch.compiler.is_compiling():
        return _eager_product(X, groups, weight.source(), transposed=transposed)
    # One op in the graph: the work depends on how rows are routed.
    packing = weight.packing
    if packing is None:
        (W,) = weight.tensors
        assert W is not None  # a dense weight is one tensor
        packing = Packing(W.shape[1:], "", 0)
    shape, kind, block_size = packing
    y: Tensor = torch.ops.lightning_peft.on_the_fly_grouped_linear(
        X, groups.offsets, groups.has_unassigned_rows, weight.tensors, list(shape), kind,
        block_size, transposed, weight.backend,
    )  # fmt: skip
    return y


def _on_the_fly(
    X: Tensor,
    offsets: Tensor,
    has_unassigned_rows: bool,
    tensors: Sequence[Tensor | None],
    shape: Sequence[int],
    kind: str,
    block_size: int,
    transposed: bool,
    backend: Backend = "auto",
) -> Tensor:
    packing = Packing((shape[0], shape[1]), kind, block_size) if kind else None
    groups = Groups(offsets, X.shape[0], has_unassigned_rows=has_unassigned_rows)
    source = FrozenWeight(tuple(tensors), packing, backend).source()
    return _eager_product(X, groups, source, transposed=transposed)


def _on_the_fly_fake(
    X: Tensor,
    offsets: Tensor,
    has_unassigned_rows: bool,
    tensors: Sequence[Tensor | None],
    shape: Sequence[int],
    kind: str,
    block_size: int,
    transposed: bool,
    backend: Backend = "auto",
) -> Tensor:
    return X.new_empty(X.shape[0], shape[0] if transposed else shape[1])


define_op(
    "on_the_fly_grouped_linear(Tensor X, Tensor offsets, bool has_unassigned_rows, Tensor?[] "
    "tensors, SymInt[] shape, str kind, int block_size, bool transposed, str backend='auto') -> "
    "Tensor",
    fake=_on_the_fly_fake,
    default=_on_the_fly,
)


def _eager_product(X: Tensor, groups: Groups, weights: WeightSource, *, transposed: bool) -> Tensor:
    """Compute X W[e]ᵀ, or X W[e], group by group."""
    if not groups.on_host:
        return weights.on_device(X, groups, transposed=transposed)
    active = groups.active
    if not active.experts:
        return X.new_zeros(X.shape[0], weights.N if transposed else weights.K)
    most = max(1, min(_BUFFER // (weights.N * weights.K), weights.experts // 4))
    few_rows = groups.rows <= len(active.experts) * _FEW_ROWS[X.element_size()]
    batched = few_rows and most >= _SIDE_BY_SIDE and X.device.type == "cpu"
    batches = active.batches(most) if batched else None
    weights.prepare(batches.experts if batches else active.experts)
    buffer = _buffer(X, (min(most, len(active.experts)), weights.N, weights.K))
    operand = buffer.mT if transposed else buffer
    if batches:
        return batches.product(
            X, operand.shape[2], _weights_by_slab(batches, weights, buffer, operand)
        )
    Y = X.new_empty(X.shape[0], operand.shape[2])
    parts = zip(active.split(X), active.split(Y), strict=True)
    for first in range(0, len(active.experts), most):
        n = min(most, len(active.experts) - first)
        weights.fill(buffer[:n], first)
        for W, (x, y) in zip(operand[:n], parts, strict=False):
            torch.mm(x, W, out=y)
    for _, y in parts:  # the unassigned rows
        y.zero_()
    return Y


def _weights_by_slab(
    batches: ExpertBatches, weights: WeightSource, buffer: Tensor, operand: Tensor
) -> Iterator[Tensor]:
    """Yield the weights of each batch; `operand` is the buffer as the product reads it."""
    first = 0
    for slab in batches.slabs:
        ends = list(itertools.accumulate(n for n, _ in slab))
        weights.fill(buffer[: ends[-1]], first)
        first += ends[-1]
        for (n, _), end in zip(slab, ends, strict=True):
            yield operand[end - n : end]


def _buffer(X: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return a buffer for weights that a product reads at once."""
    if X.device.type == "cpu":
        return thread_buffer(torch.Size(shape).numel(), X.dtype).view(shape)
    return X.new_empty(shape)
