"""Classes of bitsandbytes: which ones a storage reads, and the attributes that it uses.

`Linear4bit`, `Linear8bitLt` and their parts declare types for layers of bitsandbytes, which comes
without types. They have no instances.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

__all__ = [
    "EIGHT_BIT",
    "FOUR_BIT",
    "Linear4bit",
    "Linear8bitLt",
    "QuantState",
    "bnb_class_name",
    "linear4bit",
    "linear8bit",
]

FOUR_BIT = ("Linear4bit", "LinearNF4", "LinearFP4")
EIGHT_BIT = ("Linear8bitLt",)


class QuantState(Protocol):
    """Scales and settings of a 4-bit weight; `state2` and `offset` exist if `nested`."""

    absmax: Tensor
    blocksize: int
    quant_type: str
    dtype: torch.dtype
    nested: bool
    state2: QuantState
    offset: Tensor

    def to(self, device: torch.device) -> object:
        """Move all tensors, in place."""


class Params4bit(nn.Parameter):
    """The packed weight; `quant_state` is None before the layer is on a device."""

    quant_state: QuantState | None


class Linear4bit(nn.Linear):
    """A 4-bit layer."""

    weight: Params4bit
    quant_state: QuantState | None


class Int8Params(nn.Parameter):
    """The int8 weight; row scales are in `SCB` before the first forward."""

    SCB: Tensor


class MatmulState(Protocol):
    """State of an int8 layer; row scales are in `SCB` after the first forward."""

    SCB: Tensor | None


class Linear8bitLt(nn.Linear):
    """An int8 layer."""

    weight: Int8Params
    state: MatmulState


def linear4bit(m: nn.Module) -> Linear4bit:
    """Type the module as the layer that its class name says it is."""
    return cast(Linear4bit, m)


def linear8bit(m: nn.Module) -> Linear8bitLt:
    """Type the module as the layer that its class name says it is."""
    return cast(Linear8bitLt, m)


_CLASS_NAMES: dict[type[nn.Module], str] = {}


def bnb_class_name(cls: type[nn.Module]) -> str:
    """Name of the class of bitsandbytes that `cls` is or derives from; "" if there is none."""
    if cls not in _CLASS_NAMES:
        _CLASS_NAMES[cls] = _foundbnb_class_name(cls)
    return _CLASS_NAMES[cls]


def _foundbnb_class_name(cls: type[nn.Module]) -> str:
    for base in cls.__mro__:
        if base.__module__.startswith("bitsandbytes."):
            if base.__name__ not in (*FOUR_BIT, *EIGHT_BIT):
                raise ValueError(
                    f"bitsandbytes.{base.__name__}: expected one of "
                    f"{sorted((*FOUR_BIT, *EIGHT_BIT))}; exclude the layer with exclude_modules"
                )
            return base.__name__
    return ""
