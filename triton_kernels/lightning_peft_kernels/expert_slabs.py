"""Experts that are made side by side, and how their rows are multiplied with them.

From weights that lie in the cache already, a call for each of a few rows takes longer than the
arithmetic. Experts are taken in the order of their rows, so that those of a slab have about as
many, and become one batched product.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Slab", "Slabs", "slabs_of"]

#: Rows of the fullest expert of a slab up to which a batched product is faster (2 threads,
#: 256 × 256: in fp32 0.4 to 0.8 of the time of a call for each, in bf16 0.25 to 0.4).
_HEIGHT = 32


class Slab(NamedTuple):
    """Some experts, and rows of each; the same for all in a batched product."""

    rows: list[int]
    batched: bool


class Slabs(NamedTuple):
    """All experts that have rows."""

    #: Their numbers, in the order in which they are made.
    experts: list[int]
    each: list[Slab]
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
    # Ascending within a slab: neighbours stay neighbours.
    ordered = [sorted(by_rows[first : first + most]) for first in range(0, len(by_rows), most)]
    order = [i for together in ordered for i in together]
    each = [_slab([counts[i] for i in together]) for together in ordered]
    heights = [height for slab in each for height in slab.rows]
    ends = list(itertools.accumulate(counts))
    shift = [0] * len(counts)
    for i, slot in zip(order, itertools.accumulate(heights, initial=0), strict=False):
        shift[i] = slot - (ends[i] - counts[i])
    by_slab = torch.tensor([(shift[i], ends[i] - 1) for i in order])
    slots = sum(heights)
    moved, last = by_slab.repeat_interleave(torch.tensor(heights), 0, output_size=slots).unbind(1)
    row = (torch.arange(slots) - moved).minimum(last)
    by_row = torch.tensor(shift).repeat_interleave(torch.tensor(counts), output_size=ends[-1])
    place = torch.arange(ends[-1]) + by_row
    return Slabs([experts[i] for i in order], each, row, place)


def _slab(rows: list[int]) -> Slab:
    """From the rows of its experts."""
    n, height = len(rows), max(rows)
    if n > 1 and height <= _HEIGHT and height * n <= 2 * sum(rows):
        return Slab([height] * n, batched=True)
    return Slab(rows, batched=False)
