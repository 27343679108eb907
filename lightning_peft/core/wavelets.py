"""Daubechies' wavelets: their filters, one level of synthesis, and a change of few coefficients.
Daubechies 1988.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.sparse import Sparse
from lightning_peft.core.terms import FormedTerm

__all__ = ["FAMILIES", "Wavelet"]

#: Name → vanishing moments; filters have twice as many taps. The symlets of 2 and 3 are the same.
FAMILIES = {f"db{n}": n for n in range(1, 11)} | {"sym2": 2, "sym3": 3}


def _roots(coefficients: list[complex]) -> list[complex]:
    """Return a polynomial's roots, from its coefficients with the highest power first."""
    lead, *rest = coefficients
    if not rest:
        return []
    n = len(rest)
    companion = torch.diag(torch.ones(n - 1, dtype=torch.complex128), -1)
    companion[0] = torch.tensor([-c / lead for c in rest], dtype=torch.complex128)
    return [complex(z) for z in torch.linalg.eigvals(companion)]


@functools.lru_cache(maxsize=32)
def _low_pass(moments: int) -> tuple[float, ...]:
    """The extremal-phase filter h: zeros at −1, and of each pair (z, 1/z) the one inside."""
    binomials: list[complex] = [math.comb(moments - 1 + k, k) for k in reversed(range(moments))]
    zeros: list[complex] = [-1.0] * moments
    for y in _roots(binomials):
        zeros.append(min(_roots([1, 4 * y - 2, 1]), key=abs))  # y = (2 − z − 1/z) / 4
    h: list[complex] = [1.0]
    for z in zeros:  # times (x − z)
        h = [a - z * b for a, b in zip([*h, 0.0], [0.0, *h], strict=True)]
    total = sum(t.real for t in h)
    return tuple(t.real * math.sqrt(2) / total for t in h)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _taps(moments: int) -> tuple[float, ...]:
    return _low_pass(moments)


def synthesis_filters(family: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Low-pass and high-pass filters [2, 1, taps]; kept, so that no step copies them again."""
    if torch.compiler.is_compiling():
        return _filters(family, str(device), dtype)
    return _kept_filters(family, str(device), dtype)


def _filters(family: str, device: str, dtype: torch.dtype) -> Tensor:
    low = _taps(FAMILIES[family])
    high = [(-1) ** k * t for k, t in enumerate(reversed(low))]
    return torch.tensor([list(low), high], device=device, dtype=dtype).unsqueeze(1)


@functools.cache
def _kept_filters(family: str, device: str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what training saves must not be an inference tensor
        return _filters(family, device, dtype)


def synthesis(S: Tensor, filters: Tensor, n: int) -> Tensor:
    """Columns of S [P, M], halves of low and of high coefficients, to columns [n, M]."""
    taps = filters.shape[-1]
    halves = S.mT.reshape(S.shape[1], 2, S.shape[0] // 2)
    y = F.conv_transpose1d(halves, filters, stride=2).squeeze(1)  # [M, P − 2 + taps]
    valid = y[:, taps - 2 : y.shape[1] - (taps - 2)]
    start = (valid.shape[1] - n) // 2
    return valid[:, start : start + n].mT


@dataclass(frozen=True)
class Wavelet(FormedTerm):
    """ΔW = scaling · R_out S R_inᵀ, R one level of a wavelet's synthesis, S.flatten()[places] = c.

    S has even sizes, larger than [out, in] by what the filters cut off; places lie at its centre.
    """

    c: Tensor
    places: Tensor
    shape: tuple[int, int]
    family: str
    scaling: float

    def _places(self) -> tuple[Tensor, Tensor, int, int]:
        """(u, v, rows, columns): row and column of each c in S, and the size of S.

        peft gives the right upper quadrant to the filters of rows and the left lower one to those
        of columns: both change places.
        """
        cut = 2 * FAMILIES[self.family] - 2
        rows, columns = (n + cut + (n + cut) % 2 for n in self.shape)
        u = self.places // self.shape[1] + (rows - self.shape[0]) // 2
        v = self.places % self.shape[1] + (columns - self.shape[1]) // 2
        right, low = v >= columns // 2, u >= rows // 2
        turn = (right ^ low).int()  # one of the two off-diagonal quadrants
        u, v = (
            u + turn * torch.where(low, -1, 1) * (rows // 2),
            v + turn * torch.where(right, -1, 1) * (columns // 2),
        )
        return u, v, rows, columns

    def _wide(self) -> Tensor:
        return self.c.float() if self.c.dtype.itemsize < 4 else self.c

    def _spectrum(self) -> Tensor:
        u, v, rows, columns = self._places()
        c = self._wide()
        S = c.new_zeros(rows * columns).index_add(0, u * columns + v, self.scaling * c)
        return S.view(rows, columns)

    def _blocks(self) -> Sparse:
        """ΔW of db1: each c is a block of 2 x 2 entries ± scaling · c / 2. Blocks may overlap."""
        u, v, rows, columns = self._places()
        step = torch.arange(2, device=self.places.device)
        u, v = u.view(-1, 1, 1), v.view(-1, 1, 1)
        down, right = step.view(1, 2, 1), step.view(1, 1, 2)
        i, j = 2 * (u % (rows // 2)) + down, 2 * (v % (columns // 2)) + right
        flips = (u >= rows // 2) & (down == 1), (v >= columns // 2) & (right == 1)
        sign = torch.where(flips[0] ^ flips[1], -0.5, 0.5)
        inside = (i < self.shape[0]) & (j < self.shape[1])  # odd sizes are cut off
        c = self._wide().view(-1, 1, 1)
        values = torch.where(inside, sign.to(c.dtype) * (self.scaling * c), 0.0)
        at = torch.where(inside, i * self.shape[1] + j, 0)
        return Sparse(values.flatten().to(self.c.dtype), at.flatten(), self.shape)

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """One product with W + ΔW."""
        if self.family == "db1":
            return self._blocks().fused_linear(x, W, b)
        return super().fused_linear(x, W, b)

    def matrix(self) -> Tensor:
        """ΔW: both axes of S by strided convolutions, or entry by entry."""
        if self.family == "db1":
            return self._blocks().matrix()
        filters = synthesis_filters(self.family, self.c.device, torch.float32)
        S = self._spectrum()
        filters = filters.to(S.dtype)
        with torch.autocast(S.device.type, enabled=False):
            half = synthesis(S, filters, self.shape[0])
            delta = synthesis(half.mT, filters, self.shape[1]).mT
        return delta.to(self.c.dtype)
