"""Code tables of 4-bit quantisation, as bitsandbytes defines them, and their decision points."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["code", "fp4_order", "midpoints", "nf4_cells"]

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
# Rank in ascending order → code. The two zeros sort as 0 below 8.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

_CELLS_PER_UNIT = 16  # fine enough that no cell holds two NF4 midpoints


@lru_cache(maxsize=16)
def code(kind: str, device: str = "cpu") -> Tensor:
    """Values [16] fp32 by code."""
    values = torch.tensor(_NF4 if kind == "nf4" else _FP4, dtype=torch.float32)
    return (values + 0.0).to(device)  # −0 → +0, as in the table that dequantising uses


@lru_cache(maxsize=4)
def fp4_order(device: str = "cpu") -> Tensor:
    """Codes [16] uint8 by rank of their value."""
    return torch.tensor(_FP4_ORDER, dtype=torch.uint8, device=device)


@lru_cache(maxsize=8)
def midpoints(kind: str, device: str = "cpu") -> Tensor:
    """Decision points [15] fp32 between neighbouring values; a value on one goes to the lower
    code.
    """
    values = code(kind).sort().values
    return ((values[:-1] + values[1:]) / 2).to(device)


@lru_cache(maxsize=4)
def nf4_cells() -> tuple[Tensor, Tensor]:
    """Lookup by cell for NF4: (lowest code of the cell [33] uint8, decision point in the cell [33]
    fp32, inf if none).
    """
    mids = midpoints("nf4")
    starts = torch.arange(-_CELLS_PER_UNIT, _CELLS_PER_UNIT + 1).float() / _CELLS_PER_UNIT
    base = torch.bucketize(starts, mids)
    bound = torch.full((starts.numel(),), torch.inf, dtype=torch.float32)
    ends = starts + 1.0 / _CELLS_PER_UNIT
    for i, (low, high) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        inside = mids[(mids >= low) & (mids < high)]
        if inside.numel():
            bound[i] = inside[0]
    return base.to(torch.uint8), bound
