"""The compute stream of a device, and a stream beside it that copies."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CudaStreams", "Event", "Streams"]


class Event(Protocol):
    """A mark behind the work that a stream was given."""


class Streams(Protocol):
    """Two streams of a device; work waits only where it is told to.

    Memory of the device belongs to the compute stream: what is freed may be given to the next
    allocation at once, because work of one stream runs in order.
    """

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Allocate host memory; it is not given out again before copies on it are complete."""

    def device_like(self, host: Tensor, device: torch.device) -> Tensor:
        """Allocate memory of the device for a tensor in host memory."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy on the side stream."""

    def side_waits(self) -> None:
        """Let the side stream wait for all that the compute stream was given so far."""

    def record(self) -> Event:
        """Mark the end of what the side stream was given so far."""

    def compute_waits(self, event: Event) -> None:
        """Let the compute stream wait for a mark."""


class CudaStreams:
    """The current stream of a CUDA device and one beside it.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Allocate pinned memory; torch's allocator notes the streams that copy."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def device_like(self, host: Tensor, device: torch.device) -> Tensor:
        """Allocate memory of the device."""
        return torch.empty_like(host, device=device, pin_memory=False)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy on the side stream."""
        with torch.cuda.stream(self._side):
            into.copy_(source, non_blocking=True)

    def side_waits(self) -> None:
        """Let the side stream wait for all that the compute stream was given so far."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def record(self) -> torch.cuda.Event:
        """Mark the end of what the side stream was given so far."""
        event: torch.cuda.Event = self._side.record_event()
        return event

    def compute_waits(self, event: Event) -> None:
        """Let the compute stream wait for a mark."""
        assert isinstance(event, torch.cuda.Event)  # made by `record`
        torch.cuda.current_stream(self._device).wait_event(event)
