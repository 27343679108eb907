"""Products of few rows with dense experts on a CPU: two experts per batched product.

A product of few rows keeps one thread busy reading its weight; a batched product uses one thread
per expert. Any two experts form a batch without a copy; its stride is their distance in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_peft_kernels.experts.cpu_batches import ExpertBatches

__all__ = ["pairs_are_faster", "product_in_pairs"]

# Mean rows per expert up to which, and weights of all active experts from which, pairs beat the
# library's product per expert: 0.65 to 0.9 of its time (2 threads, fp32, 64 to 256 experts of
# 256 × 128 to 1536 × 2048). One thread reads weights in the cache fast enough.
_FEW_ROWS = 24
_MANY_WEIGHTS = 1 << 20


def pairs_are_faster(X: Tensor, W: Tensor, active: int) -> bool:
    """Whether pairs multiply X [S, K] faster by `active` experts of W [E, N, K].

    Always False if autograd records the product, which writes into `out`.
    """
    if torch.is_grad_enabled() or X.dtype != torch.float32 or X.device.type != "cpu":
        return False
    few_rows = X.shape[0] <= active * _FEW_ROWS
    return active > 1 and few_rows and active * W[0].numel() >= _MANY_WEIGHTS


def product_in_pairs(X: Tensor, W: Tensor, batches: ExpertBatches) -> Tensor:
    """Compute X[rows of e] · W[e], W [E, K, N], in slabs of two; unassigned rows give zeros."""
    return batches.product(X, W.shape[2], _views(W, batches))


def _views(W: Tensor, batches: ExpertBatches) -> Iterator[Tensor]:
    """Yield views of one or two experts of W."""
    apart, *strides = W.stride()
    experts = iter(batches.experts)
    for slab in batches.slabs:
        for n, _ in slab:
            first = next(experts)
            distance = next(experts) - first if n == 2 else 1
            start = W.storage_offset() + first * apart
            yield W.as_strided((n, *W.shape[1:]), (distance * apart, *strides), start)
