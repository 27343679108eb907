"""Host memory for a traced step: tensors leave the device, and only their sizes are kept."""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from lightning_peft.activations.host_memory import BaseHost, HostCopy, HostGroup

__all__ = ["PlannedHost"]


class PlannedHost(BaseHost):
    """The device memory of `CudaHost`, over fake tensors.

    The tensors of a block are on the device until the next block has run. In backward they come
    back together, while the block after it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._leaving: deque[tuple[HostGroup, list[Tensor]]] = deque()
        self._ahead: weakref.WeakSet[HostGroup] = weakref.WeakSet()

    def begin(self) -> HostGroup:
        """Begin a call of a block."""
        group = super().begin()
        self._leaving.append((group, []))
        return group

    def end(self) -> None:
        """End the forward of a block: the tensors of the block before it are gone."""
        while len(self._leaving) > 1:
            self._leaving.popleft()

    def put(self, tensor: Tensor, group: HostGroup) -> HostCopy:
        """Remember the size of a tensor."""
        self.moved += tensor.nbytes
        self._leaving[-1][1].append(tensor.detach())
        return _Sizes(tensor, group)

    def get(self, copy: HostCopy) -> Tensor:
        """Return a tensor of that size; those of the block before come too."""
        self._leaving.clear()
        if copy.fetched is None:
            _fetch(copy.group)
        before = None if copy.group.previous is None else copy.group.previous()
        if before is not None and before not in self._ahead:
            self._ahead.add(before)
            _fetch(before)
        assert copy.fetched is not None  # fetched above
        return self._taken(copy, copy.fetched)


class _Sizes(HostCopy):
    """A copy without values."""

    def __init__(self, tensor: Tensor, group: HostGroup) -> None:
        super().__init__(tensor.new_empty(0), tensor.device, group)
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype


def _fetch(group: HostGroup) -> None:
    for copy in group.live():
        if isinstance(copy, _Sizes) and copy.fetched is None:
            copy.fetched = torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype)
