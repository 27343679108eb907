"""Paired bootstrap: the difference of two rows over the seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Difference", "paired"]

RESAMPLES, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference and its interval.

    Attributes:
        mean: Mean of the paired differences.
        low: Lower end of the 95 % percentile interval; equal to `mean` for one seed.
        high: Its upper end.
        seeds: Number of pairs.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def verdict(self, margin: float, higher: bool = True) -> str:
        """Return ``"equal"`` if the interval lies within ± margin, else what it shows."""
        if self.seeds < 2:
            return "one seed"
        if -margin <= self.low and self.high <= margin:
            return "equal"
        if self.low > 0 or self.high < 0:
            return "better" if (self.mean > 0) == higher else "worse"
        return "undecided"


def paired(own: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return own − reference over the seeds that both have; None if there is none."""
    seeds = sorted(own.keys() & reference.keys())
    if not seeds:
        return None
    differences = np.array([own[s] - reference[s] for s in seeds])
    mean = float(differences.mean())
    if len(seeds) == 1:
        return Difference(mean, mean, mean, 1)
    drawn = np.random.default_rng(0).integers(0, len(seeds), (RESAMPLES, len(seeds)))
    cut = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(differences[drawn].mean(1), [cut, 100 - cut])
    return Difference(mean, float(low), float(high), len(seeds))
