"""Experts whose weights are stored in blocks: a few at a time are decoded for a product."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft_kernels.block_scaled.decode import decode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from lightning_peft_kernels.dispatch import Backend
from lightning_peft_kernels.experts.groups import GroupLayout, Groups
from lightning_peft_kernels.experts.products import grouped_product
from lightning_peft_kernels.experts.selected import SelectedExperts
from lightning_peft_kernels.nf4.packed import Packing

__all__ = ["BlockExperts"]


class BlockExperts:
    """A frozen W [E, N, K] stored in blocks.

    Args:
        q: What is stored of W.
        packing: (N, K) of one expert, and its `BlockLayout` as one word.
        backend: Requested backend.
    """

    def __init__(self, q: BlockTensors, packing: Packing, backend: Backend) -> None:
        N, K = packing.shape
        self.q, self.N, self.K, self.backend = q, int(N), int(K), backend
        self.layout = BlockLayout.parse(packing.kind)
        self.experts = q.codes.shape[0]

    def prepare(self, experts: list[int]) -> None:
        """Select the experts that `fill` will be called for."""
        self._selected = SelectedExperts(experts, self.q.codes.device)

    def fill(self, out: Tensor, first: int) -> None:
        """Decode selected experts from position `first` into out [n, N, K]."""
        parts = (None if t is None else self._selected.take(t, first, out.shape[0]) for t in self.q)
        q = BlockTensors(*parts)  # type: ignore[arg-type]  # codes and scales are there
        decode_blocks(q, (self.N, self.K), self.layout, out.dtype, out=out, backend=self.backend)

    def on_device(self, X: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
        """Compute the product in parts of a quarter of the experts.

        The host reads the counts: without them, every expert would be decoded at once.
        """
        active = groups.active
        Y = X.new_zeros(X.shape[0], self.N if transposed else self.K)
        if not active.experts:
            return Y
        most = max(1, -(-self.experts // 4))
        self.prepare(active.experts)
        start = 0
        for first in range(0, len(active.experts), most):
            counts = active.counts[first : first + most]
            W = X.new_empty(len(counts), self.N, self.K)
            self.fill(W, first)
            rows = sum(counts)
            ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            layout = GroupLayout(ends.to(X.device), False, None)
            part = slice(start, start + rows)
            Y[part] = grouped_product(X[part], W if transposed else W.mT, layout)
            start += rows
        return Y
