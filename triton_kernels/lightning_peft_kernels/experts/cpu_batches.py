"""Experts with few rows, in the order of their rows: several become one batched product.

A call for each of a few rows keeps one thread busy, and where the weights lie in the cache it takes
longer than the arithmetic. In that order neighbours have about as many rows, so that a batched
product is filled up little. Dense weights go two at once (`expert_pairs`), packed ones as they are
made, a slab at a time (`experts_made`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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

    def product(self, X: Tensor, width: int, weights: Iterable[Tensor]) -> Tensor:
        """Y [S, width] of X [S, K]; rows of nobody are zero.

        Args:
            X: Its rows lie expert by expert.
            width: N.
            weights: Of each batch in turn [experts, K, N], asked for when those before are done
                with: they may share a buffer.
        """
        Xs = X.index_select(0, self.row)
        Ys = X.new_empty(Xs.shape[0], width)
        batches = [batch for slab in self.each for batch in slab]
        sizes = [n * height for n, height in batches]
        parts = zip(batches, weights, Xs.split(sizes), Ys.split(sizes), strict=True)
        for (n, height), W, x, y in parts:
            if n > 1:
                torch.bmm(x.view(n, height, -1), W, out=y.view(n, height, width))
            else:
                torch.mm(x, W[0], out=y)
        joined, nobodys = Ys.index_select(0, self.place), X.shape[0] - len(self.place)
        return torch.cat([joined, X.new_zeros(nobodys, width)]) if nobodys else joined


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
