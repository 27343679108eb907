"""Code tables of 4-bit quantisation, as bitsandbytes defines them, and their decision points.

A table stays on its device as long as the process runs: a captured graph may read it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["NF4_CELLS", "SPLIT_CELL", "code", "fp4_order", "midpoints", "nf4_cells", "pair_table"]

# Quantiles of a normal distribution, normalised to [-1, 1]. Dettmers et al. 2023, arXiv:2305.14314,
# appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign bit, then three bits of magnitude.
_FP4_MAGNITUDES = (
    0.0,
    0.0052083333333,
    0.6666666666666,
    1.0,
    0.3333333333,
    0.5,
    0.16666666666,
    0.25,
)
_FP4 = (*_FP4_MAGNITUDES, *(-m for m in _FP4_MAGNITUDES))
# Rank in ascending order → code. Of the two zeros, code 0 sorts below code 8.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

NF4_CELLS = 1 << 14  # cells per unit: 32 KiB, and few values share a cell with a decision point
SPLIT_CELL = 128


@cache
def code(kind: str, device: str = "cpu") -> Tensor:
    """Return values [16] fp32 by code."""
    values = torch.tensor(_NF4 if kind == "nf4" else _FP4, dtype=torch.float32)
    return (values + 0.0).to(device)  # −0 → +0, as in bitsandbytes' table for dequantising


@cache
def fp4_order(device: str = "cpu") -> Tensor:
    """Return codes [16] uint8 by the rank of their value."""
    return torch.tensor(_FP4_ORDER, dtype=torch.uint8, device=device)


@cache
def pair_table(kind: str, dtype: torch.dtype, device: str) -> Tensor:
    """Return the table byte → its two codes in a 16-bit dtype, the even one low; int32 [256]."""
    values, byte = code(kind).to(dtype), torch.arange(256)
    pairs = torch.stack([values[byte >> 4], values[byte & 15]], dim=1)
    return pairs.view(torch.int32).view(-1).to(device)


@cache
def midpoints(kind: str, device: str = "cpu") -> Tensor:
    """Return decision points [15] fp32; a value on a decision point gets the lower code."""
    values = code(kind).sort().values
    return ((values[:-1] + values[1:]) / 2).to(device)


@cache
def nf4_cells() -> Tensor:
    """Return NF4 codes uint8 by cell, [2 · NF4_CELLS + 1].

    Cell i holds the values that round to ``i / NF4_CELLS - 1``. A cell with a decision point inside
    or on its edge holds `SPLIT_CELL`.
    """
    mids = midpoints("nf4").double()
    centres = torch.arange(-NF4_CELLS, NF4_CELLS + 1).double() / NF4_CELLS
    reach = 0.5001 / NF4_CELLS  # more than half a cell: a value may round either way on an edge
    low, high = (torch.bucketize(centres + side * reach, mids) for side in (-1, 1))
    return torch.where(low == high, low, SPLIT_CELL).to(torch.uint8)
