"""Token–expert pairs sorted by expert, and the gathers there and back."""

from __future__ import annotations

from typing import Protocol

import torch
from lightning_peft_kernels.autograd import Context, Grads, KernelFunction
from lightning_peft_kernels.experts.grouped_linear import Groups
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.layers.experts.structure import FusedExperts

__all__ = ["FromSorted", "Presorted", "Routing", "ToSorted"]


class Routing:
    """Token–expert pairs sorted by expert.

    Attributes:
        token: [S] row of the input that each pair reads.
        expert: [S] its expert, sentinels clamped.
        groups: Pairs of each expert.
        order: [S] index of the pair at each sorted place.
        inverse: [S] sorted place of each pair.
        unassigned: [S, 1] whether its expert is a sentinel; None where there are none.
    """

    def __init__(self, m: FusedExperts, index: Tensor) -> None:
        expert, self.order = torch.sort(index.reshape(-1), stable=True)
        E = m.num_experts
        # Pairs of experts that other processes hold are numbered E: they sort to the end. A module
        # without the decorator does not say whether there are such.
        has_unassigned = bool(getattr(m, "_is_expert_parallel", not hasattr(m, "has_gate")))
        self.token = self.order // index.shape[-1]
        self.groups = Groups.sorted(expert, E, has_unassigned_rows=has_unassigned)
        self.expert = expert.clamp(max=E - 1) if has_unassigned else expert
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(self.order.numel(), device=index.device)
        self.unassigned = expert.unsqueeze(-1) >= E if has_unassigned else None


class _ToSortedContext(Context, Protocol):
    """Context of `ToSorted`: the values that forward saves for backward."""

    shape: tuple[int, int, int]


class ToSorted(KernelFunction):
    """Gather x [T, d] into sorted pairs [S, d].

    Backward gathers as well, like that of `FromSorted`: adding to repeated indices is sequential
    on a CPU and needs a sort on CUDA.
    """

    @staticmethod
    def forward(ctx: _ToSortedContext, x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        """Gather the rows that the pairs read."""
        ctx.save_for_backward(inverse)
        ctx.shape = x.shape[0], token.shape[0] // max(1, x.shape[0]), x.shape[1]
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: _ToSortedContext, dY: Tensor) -> Grads:
        """Sum the gradients of the pairs of each token."""
        (inverse,) = ctx.saved_tensors
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if len(dY) and dY.device.type == "cpu" and not traced:  # read and sum in one pass
            return F.embedding_bag(inverse.view(ctx.shape[:2]), dY, mode="sum"), None, None
        return dY.index_select(0, inverse).view(ctx.shape).sum(dim=1), None, None


class FromSorted(KernelFunction):
    """Gather sorted pairs h [S, d] into the order of the input."""

    @staticmethod
    def forward(ctx: Context, h: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Gather the pairs into the order of the input."""
        ctx.save_for_backward(order)
        return h.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Context, dY: Tensor) -> Grads:
        """Gather the gradients into sorted order."""
        (order,) = ctx.saved_tensors
        return dY.index_select(0, order), None, None


class Presorted(Routing):
    """Routing of rows sorted by expert, the same number for each."""

    def __init__(self, m: FusedExperts, rows: int) -> None:
        device, E = m.down_proj.device, m.num_experts
        each = rows // E
        ends = torch.arange(1, E + 1, device=device, dtype=torch.int32) * each
        self.groups = Groups(ends, rows)
        self.expert = torch.arange(rows, device=device) // each
        self.unassigned = None
