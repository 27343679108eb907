"""Few rows with dense experts: two in one batched product, wherever they lie.

A product of few rows keeps one thread busy reading its weight, a batched one a thread for each
expert. Any two experts of a weight are a batch, with their distance as its stride: nothing is
copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_peft_kernels.experts.cpu_batches import Slabs

__all__ = ["in_pairs", "pays_in_pairs"]

#: Rows of a mean expert up to which, and weights of all that have rows from which pairs are faster
#: than the library's product expert by expert: 0.65 to 0.9 of its time (2 threads, fp32, 64 to 256
#: experts of 256 × 128 to 1536 × 2048). What the caches hold is read fast by one thread too.
_FEW_ROWS = 24
_MANY_WEIGHTS = 1 << 20


def pays_in_pairs(X: Tensor, W: Tensor, used: int) -> bool:
    """Whether X [S, K] is multiplied faster in pairs with so many experts of W [E, N, K]. Not where
    the product is recorded: what is written into cannot be.
    """
    if torch.is_grad_enabled() or X.dtype != torch.float32 or X.device.type != "cpu":
        return False
    few_rows = X.shape[0] <= used * _FEW_ROWS
    return used > 1 and few_rows and used * W[0].numel() >= _MANY_WEIGHTS


def in_pairs(X: Tensor, W: Tensor, slabs: Slabs) -> Tensor:
    """X[rows of e] · W[e], W [E, K, N], by slabs of two; rows of nobody are zero."""
    return slabs.product(X, W.shape[2], _views(W, slabs))


def _views(W: Tensor, slabs: Slabs) -> Iterator[Tensor]:
    """W of one or two experts, in place."""
    apart, *strides = W.stride()
    experts = iter(slabs.experts)
    for slab in slabs.each:
        for n, _ in slab:
            first = next(experts)
            distance = next(experts) - first if n == 2 else 1
            start = W.storage_offset() + first * apart
            yield W.as_strided((n, *W.shape[1:]), (distance * apart, *strides), start)
