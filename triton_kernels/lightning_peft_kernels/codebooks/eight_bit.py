"""The 8-bit dynamic maps of bitsandbytes, and nearest codes by one table lookup.

Read fp32 values as integers, with negatives folded to keep the order. Values with one upper half
(sign, exponent, 7 bits of mantissa) meet at most one decision point of a map. Let j be the upper
half, c the lowest code of that cell and t the lower half of its decision point (65535 if none). The
code is c + [lower half > t], and the table entry
    cell[j] = (c << 16) + 65535 − t − (j << 16)        gives        code = (bits + cell[j]) >> 16.
A value on a decision point goes to the lower code.

A table stays on its device as long as the process runs: a captured graph may read it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "TINY",
    "ZERO_CODE",
    "coarse_cells",
    "code_cells",
    "code_pairs",
    "decision_points",
    "dequantize_blocks",
    "dynamic_map",
    "nearest_codes",
    "quantize_blocks",
    "searched_codes",
]

BLOCK = 256  # elements that share an absmax
TINY = 2e-38  # least absmax whose reciprocal is finite
ZERO_CODE = {True: 127, False: 0}  # code of 0 in the signed and in the unsigned map
_SIGN_OFFSET = 32768  # upper halves of folded negatives are −32768…−1


@cache
def dynamic_map(signed: bool = True, device: str = "cpu") -> Tensor:
    """Return the values [256] fp32 of the dynamic 8-bit type, ascending: seven even decades.

    The signed map runs from −0.99297 to 1 with 0 at code 127; the unsigned map from 0 to 1.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for i in range(7):
        n = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, n + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values.append(10 ** (i - 6) * means)
        if signed:
            values.append(-(10 ** (i - 6)) * means)
    return torch.cat(values).sort().values.to(device)


@cache
def decision_points(signed: bool, device: str = "cpu") -> Tensor:
    """Return the midpoints [255] fp32 between neighbouring values of a map."""
    values = dynamic_map(signed)
    return (0.5 * (values[:-1] + values[1:])).to(device)


def nearest_codes(values: Tensor, signed: bool) -> Tensor:
    """Return codes uint8 of fp32 `values` by searching the decision points."""
    return torch.searchsorted(decision_points(signed, str(values.device)), values).to(torch.uint8)


@cache
def code_cells(signed: bool, device: str = "cpu") -> Tensor:
    """Return the table: int32 [65536] for the signed map (entry j + 32768), [32768] unsigned."""
    bits = decision_points(signed).view(torch.int32)
    points = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    first = -_SIGN_OFFSET if signed else 0
    cells = torch.arange(first, _SIGN_OFFSET)
    lowest = torch.searchsorted(points, cells << 16)
    bound = torch.full_like(cells, 65535)
    bound[(points >> 16) - first] = points & 65535
    entry = (lowest << 16) + 65535 - bound - (cells << 16)
    # int32 arithmetic wraps; the sum with the bits does not overflow.
    wrapped = (entry + 2**31) % 2**32 - 2**31
    return wrapped.to(torch.int32).to(device)


@cache
def code_pairs(signed: bool) -> Tensor:
    """Return pairs of values, int64 [65536]: entry c0 + 256·c1 is (map[c0], map[c1])."""
    values = dynamic_map(signed)
    low = values.repeat(256)
    high = values.repeat_interleave(256)
    return torch.stack([low, high], dim=1).contiguous().view(torch.int64).reshape(-1)


@cache
def coarse_cells() -> Tensor:
    """Return codes [65536] uint8 of the signed map for values in steps of 2/65535 from −1.

    bitsandbytes on CPU uses this rule.
    """
    values = dynamic_map()
    mids = 0.5 * (values[:-1] + values[1:])
    grid = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535.0
    return torch.searchsorted(mids, grid).to(torch.uint8)


def searched_codes(values: Tensor) -> Tensor:
    """Return codes uint8 of fp32 `values` in [-1, 1] in the signed map.

    bitsandbytes on CUDA uses this rule: seven search steps from code 127, then the midpoint towards
    the last neighbour passed. A value on a midpoint keeps the code at which the search ended.
    """
    table = dynamic_map(True, str(values.device))
    pivot = torch.full(values.shape, 127, device=values.device)
    below, above = torch.zeros_like(pivot), torch.full_like(pivot, 255)
    for i in range(7):
        up = values > table[pivot]
        below, above = torch.where(up, pivot, below), torch.where(up, above, pivot)
        pivot = torch.where(up, pivot + (64 >> i), pivot - (64 >> i))
    here = table[pivot]
    high = torch.where(values > (table[above] + here) * 0.5, above, pivot)
    low = torch.where(values < (table[below] + here) * 0.5, below, pivot)
    return torch.where(values > here, high, low).to(torch.uint8)


def quantize_blocks(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [n] and absmax fp32 [⌈n/256⌉] of flat `values` [n]."""
    n = values.numel()
    blocks = -(-n // BLOCK)
    padded = torch.zeros(blocks * BLOCK, dtype=torch.float32, device=values.device)
    padded[:n] = values.detach().reshape(-1)
    rows = padded.view(blocks, BLOCK)
    absmax = rows.abs().amax(1) if blocks else rows.new_empty(0)
    scaled = rows * absmax.clamp_min(TINY).reciprocal()[:, None]
    return nearest_codes(scaled.view(-1), signed)[:n], absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """Return values fp32 [n] of codes [n] and absmax [⌈n/256⌉]."""
    n = codes.numel()
    scale = absmax.repeat_interleave(BLOCK)[:n]
    return dynamic_map(signed, str(codes.device))[codes.reshape(-1).int()] * scale
