"""Layout of a block-scaled weight: the meaning of its codes, and which block each scale covers.

    W[n, k] = (value(code[n, k]) - zero[n // rows, k // columns]) · scale[n // rows, k // columns]

The last block of a row or column may be partial. A weight whose `halves` are blocked apart (gate
and up of a gated layer, concatenated) has the scale rows of its first half before those of its
second half.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

__all__ = ["BlockLayout", "BlockTensors", "Element", "ScaleType", "block_grid"]

Element = Literal["e4m3", "e2m1", "int4", "uint4", "int8"]
ScaleType = Literal["float32", "bfloat16", "float16", "e8m0", "e4m3"]

_SCALES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}


class BlockTensors(NamedTuple):
    """What is stored of one weight, or of a stack of experts with a leading axis.

    Attributes:
        codes: uint8 [*, N, bytes]. Codes of 4 bits lie two per byte, the first in the low bits.
        scales: uint8, bytes of [*, blocks along N, blocks along K] in the scale's dtype.
        outer: fp32 [*] or one per half [*, 2], by which scales are multiplied; None if there is
            none.
        zeros: int8, one per scale; None for symmetric codes.
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor | None = None
    zeros: Tensor | None = None


class BlockLayout(NamedTuple):
    """Layout of a weight [N, K].

    Attributes:
        element: Code of one weight. ``"int4"`` is stored with 8 added, ``"uint4"`` without.
        rows: Weights per scale along N; 0 means all.
        columns: Weights per scale along K; 0 means all.
        halves: 2 if the rows are two halves that are blocked apart, else 1.
        scale: Dtype of the stored scales; ``"e8m0"`` is a power of two, 2^(byte - 127).
    """

    element: Element
    rows: int
    columns: int
    halves: int = 1
    scale: ScaleType = "float32"

    def __str__(self) -> str:
        """One word, for instance ``e4m3:128x128:1:float32``; inverse of `parse`."""
        return f"{self.element}:{self.rows}x{self.columns}:{self.halves}:{self.scale}"

    @classmethod
    def parse(cls, word: str) -> BlockLayout:
        """Return the layout that `str` wrote."""
        element, block, halves, scale = word.split(":")
        rows, columns = (int(n) for n in block.split("x"))
        kind, stored = cast("Element", element), cast("ScaleType", scale)
        return cls(kind, rows, columns, int(halves), stored)

    @property
    def codes_per_byte(self) -> int:
        """1 or 2."""
        return 1 if self.element in ("e4m3", "int8") else 2

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the stored scales."""
        return _SCALES[self.scale]

    def block(self, N: int, K: int) -> tuple[int, int]:
        """Rows and columns of a full block of a weight [N, K]."""
        return self.rows or N // self.halves, self.columns or K

    def grid(self, N: int, K: int) -> tuple[int, int]:
        """Number of scales along N and along K."""
        rows, columns = self.block(N, K)
        half = -(-(N // self.halves) // rows)
        return self.halves * half, -(-K // columns)


def block_grid(
    q: BlockTensors, layout: BlockLayout, N: int, K: int
) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points, fp32 [*, blocks along N, blocks along K]."""
    lead, (grid_n, grid_k) = q.codes.shape[:-2], layout.grid(N, K)
    typed = q.scales.view(layout.scale_dtype)
    scales = _power(q.scales) if layout.scale == "e8m0" else typed.to(torch.float32)
    scales = scales.reshape(*lead, grid_n, grid_k)
    if q.outer is not None:
        outer = q.outer.to(torch.float32).reshape(*lead, -1, 1)
        scales = scales * outer.repeat_interleave(grid_n // outer.shape[-2], dim=-2)
    return scales, None if q.zeros is None else q.zeros.to(torch.float32)


def _power(byte: Tensor) -> Tensor:
    """2^(byte - 127) by its fp32 bits; byte 0 is the subnormal 2^-127."""
    bits = byte.to(torch.int32) << 23
    return torch.where(byte == 0, 1 << 22, bits).to(torch.int32).view(torch.float32)
