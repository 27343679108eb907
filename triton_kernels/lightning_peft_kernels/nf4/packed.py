"""A weight packed to 4 bits: its bytes, and the layout needed to decode them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Packed4bit", "Packing"]


class Packed4bit(NamedTuple):
    """Bytes of one weight.

    Attributes:
        packed: uint8, ⌈n/2⌉ elements in any shape.
        absmax: uint8 codes [blocks] if nested, else fp32 [blocks].
        absmax2: fp32 [⌈blocks/256⌉] if nested.
        offset: fp32 [1] if nested.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None


class Packing(NamedTuple):
    """Layout of the weight in a `Packed4bit`.

    Attributes:
        shape: Shape of the weight, [N, K].
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Elements per scale.
    """

    shape: Sequence[int]
    kind: str
    block_size: int
