"""Experts that are made side by side, and how their rows are multiplied with them.

From weights that lie in the cache already, a call for each of a few rows takes longer than the
arithmetic, and keeps one thread busy. Experts are taken in the order of their rows, so that
neighbours have about as many and can be one batched product.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "Slabs", "slabs_of"]

#: Rows of the fullest expert of a batched product up to which it is faster, and slots it may have
#: for each row. 2 threads, 256 × 256: in fp32 0.4 to 0.8 of the time of a call for each, in bf16
#: 0.25 to 0.4.
_HEIGHT = 32
_SLOTS = 2


class Batch(NamedTuple):
    """Experts of one batched product; one by itself where no other has about as many rows."""

    experts: int
    #: Rows of the fullest; the others are filled up.
    height: int


class Slabs(NamedTuple):
    """All experts that have rows."""

    #: Their numbers, in the order in which they are made; ascending in a batched product.
    experts: list[int]
    #: Those that are made together.
    each: list[list[Batch]]
    #: int64 [slots], the row that stands there, an expert's last again where it is filled up.
    row: Tensor
    #: int64 [used], where each row of an expert stands; those behind are nobody's.
    place: Tensor

    def cut(self, X: Tensor) -> Tensor:
        """[S, K] as [slots, K]."""
        return X.index_select(0, self.row)

    def joined(self, Y: Tensor, rows: int) -> Tensor:
        """[slots, N] as [S, N]; rows of nobody are zero."""
        joined, nobodys = Y.index_select(0, self.place), rows - len(self.place)
        return torch.cat([joined, Y.new_zeros(nobodys, Y.shape[1])]) if nobodys else joined


def slabs_of(experts: list[int], counts: list[int], most: int) -> Slabs:
    """Slabs of at most that many experts.

    Args:
        experts: Numbers of those that have rows, ascending.
        counts: How many rows; they lie one behind the other.
        most: Experts of a slab.
    """
    by_rows = sorted(range(len(counts)), key=counts.__getitem__)
    order: list[int] = []
    each: list[list[Batch]] = []
    for first in range(0, len(by_rows), most):
        batches = _batches(by_rows[first : first + most], counts)
        order += [i for batch in batches for i in batch]
        each.append([Batch(len(batch), max(counts[i] for i in batch)) for batch in batches])
    heights = [batch.height for slab in each for batch in slab for _ in range(batch.experts)]
    ends = list(itertools.accumulate(counts))
    shift = [0] * len(counts)
    for i, slot in zip(order, itertools.accumulate(heights, initial=0), strict=False):
        shift[i] = slot - (ends[i] - counts[i])
    by_slot = torch.tensor([(shift[i], ends[i] - 1) for i in order])
    slots = sum(heights)
    moved, last = by_slot.repeat_interleave(torch.tensor(heights), 0, output_size=slots).unbind(1)
    row = (torch.arange(slots) - moved).minimum(last)
    by_row = torch.tensor(shift).repeat_interleave(torch.tensor(counts), output_size=ends[-1])
    place = torch.arange(ends[-1]) + by_row
    return Slabs([experts[i] for i in order], each, row, place)


def _batches(order: list[int], counts: list[int]) -> list[list[int]]:
    """Runs of `order`, which has counts ascending, that fill a batched product well enough; each
    ascending.
    """
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
