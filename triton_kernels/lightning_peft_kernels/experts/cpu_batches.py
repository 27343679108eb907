"""Batched products over several experts with few rows, ordered by their number of rows.

One call per few rows keeps one thread busy, and takes longer than the arithmetic if the weights are
in the cache. Ordered by rows, neighbours have similar numbers of rows, so a batched product needs
little padding. Dense weights are multiplied in pairs (`cpu_pairs`), packed ones slab by slab as
they are dequantised (`on_the_fly_linear`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "ExpertBatches", "batches_of"]

# Rows of the fullest expert up to which a batched product is faster, and slots per row that it may
# have. 2 threads, 256 × 256: 0.4 to 0.8 of the time of one call per expert in fp32, 0.25 to 0.4 in
# bf16.
_HEIGHT = 32
_SLOTS = 2


class Batch(NamedTuple):
    """Experts of one batched product; a single expert if no other has a similar number of rows.

    Attributes:
        experts: Number of experts.
        height: Rows of the fullest expert; the others are padded to it.
    """

    experts: int
    height: int


class ExpertBatches(NamedTuple):
    """All active experts, in batches.

    Attributes:
        experts: Numbers of the experts in order of computation; ascending within a batch.
        slabs: Batches whose weights share one buffer, per slab.
        row: Source row of each slot, int64 [slots]; padding repeats an expert's last row.
        position: Slot of each assigned row, int64; the trailing rows belong to no expert.
    """

    experts: list[int]
    slabs: list[list[Batch]]
    row: Tensor
    position: Tensor

    def product(self, X: Tensor, width: int, weights: Iterable[Tensor]) -> Tensor:
        """Compute Y [S, width] of X [S, K]; unassigned rows give zeros.

        Args:
            X: Rows sorted by expert.
            width: N.
            weights: Weight of each batch in turn, [experts, K, N]. The next one is requested after
                the previous product, so they may share a buffer.
        """
        Xs = X.index_select(0, self.row)
        Ys = X.new_empty(Xs.shape[0], width)
        batches = [batch for slab in self.slabs for batch in slab]
        sizes = [n * height for n, height in batches]
        parts = zip(batches, weights, Xs.split(sizes), Ys.split(sizes), strict=True)
        for (n, height), W, x, y in parts:
            if n > 1:
                torch.bmm(x.view(n, height, -1), W, out=y.view(n, height, width))
            else:
                torch.mm(x, W[0], out=y)
        joined, unassigned = Ys.index_select(0, self.position), X.shape[0] - len(self.position)
        return torch.cat([joined, X.new_zeros(unassigned, width)]) if unassigned else joined


def batches_of(experts: list[int], counts: list[int], most: int) -> ExpertBatches:
    """Distribute experts over slabs of at most `most` experts.

    Args:
        experts: Numbers of the active experts, ascending.
        counts: Rows of each; consecutive in X.
        most: Experts per slab.
    """
    by_rows = sorted(range(len(counts)), key=counts.__getitem__)
    order: list[int] = []
    slabs: list[list[Batch]] = []
    for first in range(0, len(by_rows), most):
        batches = _batches(by_rows[first : first + most], counts)
        order += [i for batch in batches for i in batch]
        slabs.append([Batch(len(batch), max(counts[i] for i in batch)) for batch in batches])
    heights = [batch.height for slab in slabs for batch in slab for _ in range(batch.experts)]
    ends = list(itertools.accumulate(counts))
    shift = [0] * len(counts)
    for i, slot in zip(order, itertools.accumulate(heights, initial=0), strict=False):
        shift[i] = slot - (ends[i] - counts[i])
    by_slot = torch.tensor([(shift[i], ends[i] - 1) for i in order])
    slots = sum(heights)
    moved, last = by_slot.repeat_interleave(torch.tensor(heights), 0, output_size=slots).unbind(1)
    row = (torch.arange(slots) - moved).minimum(last)
    by_row = torch.tensor(shift).repeat_interleave(torch.tensor(counts), output_size=ends[-1])
    position = torch.arange(ends[-1]) + by_row
    return ExpertBatches([experts[i] for i in order], slabs, row, position)


def _batches(order: list[int], counts: list[int]) -> list[list[int]]:
    """Split `order`, ascending by counts, into runs that need little padding; each is ascending."""
    batches: list[list[int]] = []
    rows = 0
    for i in order:
        height = counts[i]
        slots = height * (len(batches[-1]) + 1) if batches else 0
        if not batches or height > _HEIGHT or slots > _SLOTS * (rows + height):
            batches.append([])
            rows = 0
        batches[-1].append(i)
        rows += height
    return [sorted(batch) for batch in batches]
