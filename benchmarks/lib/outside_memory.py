"""Offloading as on CUDA for a model on the CPU: host memory is memory that torch does not count."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from lightning_peft.activations.host_memory import CudaHost, HostMemories
from lightning_peft.activations.streams import Event

__all__ = ["outside_memories"]


class OneStream:
    """Both streams of a device in one: a copy is complete at once, so no event is needed.

    `CudaHost` over it holds and fetches what it does on CUDA, and a trace of torch's allocations
    shows what stays on the device.
    """

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Return a tensor in an anonymous map."""
        kept = torch.frombuffer(mmap.mmap(-1, max(1, tensor.nbytes)), dtype=tensor.dtype)
        strides = torch.empty_like(tensor, device="meta").stride()
        return kept.as_strided(tensor.shape, strides)

    def device_like(self, host: Tensor, device: torch.device) -> Tensor:
        """Allocate memory that torch counts."""
        return torch.empty_like(host, device=device)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy."""
        into.copy_(source)

    def side_waits(self) -> None:
        """Nothing is under way."""

    def record(self) -> Event:
        """Return a mark that nothing waits for."""
        return object()

    def compute_waits(self, event: Event) -> None:
        """Nothing is under way."""


def outside_memories() -> HostMemories:
    """Return memories outside of torch's."""
    return HostMemories(lambda device: CudaHost(OneStream()))
