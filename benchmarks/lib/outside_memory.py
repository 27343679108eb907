"""Host memory for a model on the CPU: tensors are copied to memory that torch does not allocate."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from lightning_peft.activations.host_memory import (
    HostCopy,
    HostGroup,
    HostMemories,
    SynchronousHost,
)

__all__ = ["outside_memories"]


class OutsideMemory(SynchronousHost):
    """Copies to anonymous maps, so that a trace of torch's allocations shows what stays."""

    def put(self, tensor: Tensor, group: HostGroup) -> HostCopy:
        """Copy a tensor out of torch's memory."""
        self.moved += tensor.nbytes
        kept = torch.frombuffer(mmap.mmap(-1, max(1, tensor.nbytes)), dtype=torch.uint8)
        kept.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        return _Outside(kept, tensor, group)

    def get(self, copy: HostCopy) -> Tensor:
        """Copy a tensor back."""
        assert isinstance(copy, _Outside)
        if copy.fetched is None:
            copy.fetched = copy.host.view(copy.dtype).view(copy.shape).clone()
        return self._taken(copy, copy.fetched)


class _Outside(HostCopy):
    """Bytes outside of torch's memory, and what they are."""

    def __init__(self, host: Tensor, tensor: Tensor, group: HostGroup) -> None:
        super().__init__(host, tensor.device, group)
        self.shape, self.dtype = tensor.shape, tensor.dtype


def outside_memories() -> HostMemories:
    """Return memories outside of torch's."""
    return HostMemories(lambda device: OutsideMemory())
