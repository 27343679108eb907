"""A matrix packed to 4 bits: codes, scales and what is needed to decode them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Packed4bit"]


class Packed4bit(NamedTuple):
    """Bytes of one weight.

    Attributes:
        packed: uint8, ⌈n/2⌉ elements in any shape.
        absmax: uint8 codes [blocks] when nested, else fp32 [blocks].
        absmax2: fp32 [⌈blocks/256⌉] when nested.
        offset: fp32 [1] when nested.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
