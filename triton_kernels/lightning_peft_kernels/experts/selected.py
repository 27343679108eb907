"""Experts that a product uses, and their part of a tensor with a leading expert axis."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

__all__ = ["SelectedExperts"]


class SelectedExperts:
    """Experts that `fill` will be called for.

    Args:
        experts: Their numbers, ascending.
        device: Device of the tensors.
    """

    def __init__(self, experts: list[int], device: torch.device) -> None:
        self.experts, self.device = experts, device

    def take(self, t: Tensor, first: int, n: int) -> Tensor:
        """Return t of n selected experts from position `first`; a view if they are neighbours."""
        low = self.experts[first]
        if self.experts[first : first + n] == list(range(low, low + n)):
            return t[low : low + n]
        return t.index_select(0, self._index[first : first + n])

    @cached_property
    def _index(self) -> Tensor:
        """The experts on the device. If only a GPU knows the counts, all of them are selected, so
        this copy, for which the host would wait, is not made there.
        """
        return torch.tensor(self.experts, device=self.device)
