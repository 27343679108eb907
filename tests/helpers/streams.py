"""A loader with a state, so that a run may stop and go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Stream"]


class Stream:
    """Batches [rows, features] of seeded noise."""

    def __init__(self, batches: int = 24, rows: int = 4, features: int = 8) -> None:
        self.batches, self.rows, self.features = batches, rows, features
        self.start = self.at = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        start, self.start = self.start, 0
        for i in range(start, self.batches):
            self.at = i + 1
            generator = torch.Generator().manual_seed(i)
            yield torch.randn(self.rows, self.features, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at % self.batches}  # an epoch that ended starts again

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.at = state["at"]
