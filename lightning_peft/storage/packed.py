"""Meaning of the bytes that hold a quantised weight, kept on the module that holds them.

Every tensor is held as uint8, scales as their bytes, so that `.half()`, ``precision="bf16-true"``
or an optimizer cannot round them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

__all__ = [
    "QuantizedWeightSpec",
    "TensorFormat",
    "as_bytes",
    "from_bytes",
    "packed_tensors",
    "specs_of",
    "to_bytes",
]


class TensorFormat(NamedTuple):
    """What the bytes of one tensor are outside of the storage."""

    dtype: torch.dtype
    shape: torch.Size
    requires_grad: bool = False


@dataclass
class QuantizedWeightSpec:
    """Meaning of the bytes of one weight.

    Attributes:
        kind: Label of the storage.
        shape: Canonical [*batch, out, in].
        transposed: Whether the natural weight is [*batch, in, out].
        dtype: Dtype the weight had, or the compute dtype of the configuration.
        keys: Role of each tensor → its name in the module; ``"codes"`` is the weight's.
        formats: Role → dtype and shape of the tensor outside of the storage.
        adopted: Whether the weight arrived quantised.
    """

    kind: str
    shape: torch.Size
    transposed: bool
    dtype: torch.dtype
    keys: dict[str, str] = field(default_factory=dict)
    formats: dict[str, TensorFormat] = field(default_factory=dict)
    adopted: bool = False

    @property
    def natural_shape(self) -> torch.Size:
        """Shape of the weight as the layer defines it."""
        *batch, out, width = self.shape
        return torch.Size((*batch, width, out)) if self.transposed else self.shape

    def canonical(self, W: Tensor) -> Tensor:
        """Natural → canonical, a view."""
        return W.mT if self.transposed else W

    natural = canonical  # the transpose is its own inverse


def specs_of(m: nn.Module) -> dict[str, Any]:
    """Specification of each quantised weight of a module, by name; empty for a dense one."""
    found: dict[str, Any] | None = vars(m).get("_packed")
    return {} if found is None else found


def packed_tensors(m: nn.Module, name: str) -> dict[str, Tensor]:
    """Role → held tensor of one weight, as uint8."""
    keys: dict[str, str] = specs_of(m)[name].keys
    # The specification lists tensors that are there.
    held = cast("dict[str, Tensor]", {**m._parameters, **m._buffers})
    return {role: as_bytes(held[key]) for role, key in keys.items()}


def as_bytes(t: Tensor) -> Tensor:
    """View a held tensor as uint8: a strategy may hold it as a floating parameter."""
    return t if t.dtype == torch.uint8 else t.view(torch.uint8)


def to_bytes(t: Tensor) -> Tensor:
    """uint8 with the same leading axes, so that cutting tensors by rows cuts the bytes with them.

    A vector becomes [n, bytes per element], a scalar [1, bytes].
    """
    rows = t.detach().reshape(-1, 1) if t.ndim < 2 else t.detach()
    if rows.stride(-1) != 1:  # torch calls the transpose of one row contiguous
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.contiguous().view(torch.uint8)


def from_bytes(t: Tensor, form: TensorFormat) -> Tensor:
    """Inverse of `to_bytes`; the leading axis may be cut."""
    values = t.view(form.dtype)
    if len(form.shape) < 2:
        return values.reshape(-1) if form.shape else values.reshape(())
    return values
