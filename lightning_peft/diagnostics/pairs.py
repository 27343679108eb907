"""Results beside their reference, with the limit between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning_peft_kernels.nf4.packed import Packed4bit
from lightning_peft_kernels.nf4.reference import quantize_4bit_reference
from torch import Tensor

__all__ = ["Pair", "Shape", "bits", "close", "packed_on", "randn", "to_device", "wrong_by"]

# Largest error against fp64, as a share of the largest value: two roundings of the dtype and the
# order of sums.
_LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Shape(NamedTuple):
    """Sizes of a check.

    Attributes:
        N: Rows of W.
        K: Columns of W.
        tokens: Rows of x.
    """

    N: int
    K: int
    tokens: int


@dataclass(frozen=True)
class Pair:
    """A result and its reference.

    Attributes:
        name: The quantity.
        got: Result of the kernel.
        want: Reference.
        limit: Largest difference allowed.
    """

    name: str
    got: Tensor
    want: Tensor
    limit: float

    def violation(self) -> str:
        """Return by how much the limit is exceeded; "" if it is kept."""
        got, want = self.got.detach().cpu().double(), self.want.detach().cpu().double()
        if got.shape != want.shape:
            return f"{self.name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = float((got - want).abs().max()) if got.numel() else 0.0
        if error <= self.limit:  # False for NaN
            return ""
        return f"{self.name}: error {error:.3g}, limit {self.limit:.3g}"


def bits(name: str, got: Tensor, want: Tensor) -> Pair:
    """Compare values that are defined bit for bit."""
    return Pair(name, got, want, limit=0.0)


def close(name: str, got: Tensor, want: Tensor) -> Pair:
    """Compare with fp64, relative to the largest value."""
    largest = float(want.abs().max()) if want.numel() else 0.0
    return Pair(name, got, want, limit=_LIMITS[got.dtype] * max(largest, 1e-30))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Draw fp32 on the CPU; the same on every machine and without effect on other generators."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_on(
    device: torch.device, N: int, K: int, nested: bool, seed: int = 0
) -> tuple[Packed4bit, Packed4bit]:
    """Return a packed W [N, K] on the CPU, and the same bytes on the device."""
    q = quantize_4bit_reference(randn(N, K, seed=seed) / K**0.5, double_quant=nested)
    return q, to_device(q, device)


def to_device(q: Packed4bit, device: torch.device) -> Packed4bit:
    """Return the same bytes on a device."""
    second, offset = (None if t is None else t.to(device) for t in q[2:])
    return Packed4bit(q.packed.to(device), q.absmax.to(device), second, offset)


def wrong_by(got: Tensor, want: Tensor) -> str:
    """Return by how much a result is farther from another way's than rounding explains, or ""."""
    largest = float(want.double().abs().max()) if want.numel() else 0.0
    return Pair("y", got, want, limit=2 * _LIMITS[got.dtype] * max(largest, 1e-30)).violation()
