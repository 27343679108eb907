"""Daubechies' wavelets: their filters, and one level of synthesis. Daubechies 1988."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FAMILIES", "synthesis", "synthesis_filters"]

#: Name → vanishing moments; filters have twice as many taps. The symlets of 2 and 3 are the same.
FAMILIES = {f"db{n}": n for n in range(1, 11)} | {"sym2": 2, "sym3": 3}


def _roots(coefficients: list[complex]) -> list[complex]:
    """Of a polynomial, highest power first: eigenvalues of its companion matrix."""
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
