"""Moves tensors to host memory in forward and back in backward.

On CUDA a side stream copies to pinned memory while the next block computes. In backward, the
tensors of a block are fetched while the block after it runs. Other devices copy in place of the
compute; on the CPU nothing moves.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_peft.activations.streams import CudaStreams, Event, Streams
from lightning_peft.core.per_thread import PerThread

__all__ = [
    "BaseHost",
    "CudaHost",
    "HostCopy",
    "HostGroup",
    "HostMemories",
    "HostMemory",
    "SynchronousHost",
]


class HostCopy:
    """One tensor in host memory.

    Attributes:
        host: The values in host memory.
        device: Where the tensor belongs.
        group: The tensors of the same block.
        uses: Number of saved tensors that read this copy.
        left: Number of them that backward has not read yet.
        fetched: The tensor on its device, while backward reads it.
    """

    def __init__(self, host: Tensor, device: torch.device, group: HostGroup) -> None:
        self.host = host
        self.device = device
        self.group = group
        group.copies.append(weakref.ref(self))
        self.uses = self.left = 0
        self.fetched: Tensor | None = None


class HostGroup:
    """The copies that one call of a block made, and the call before it.

    Attributes:
        previous: The group of the call before, which backward reads next.
        copies: The copies that autograd still holds.
        ready: Event after which the fetched tensors are complete; None if none are under way.
    """

    def __init__(self, previous: HostGroup | None) -> None:
        self.previous = None if previous is None else weakref.ref(previous)
        self.copies: list[weakref.ref[HostCopy]] = []
        self.ready: Event | None = None

    def live(self) -> list[HostCopy]:
        """Return the copies that autograd still holds."""
        return [copy for ref in self.copies if (copy := ref()) is not None]


class HostMemory(Protocol):
    """Place of saved tensors between forward and backward.

    Attributes:
        moved: Bytes moved to host memory so far.
    """

    moved: int

    def begin(self) -> HostGroup:
        """Begin a call of a block."""
        ...

    def end(self) -> None:
        """End the forward of the block that began last."""
        ...

    def put(self, tensor: Tensor, group: HostGroup) -> HostCopy:
        """Copy a tensor to host memory."""
        ...

    def get(self, copy: HostCopy) -> Tensor:
        """Return a tensor on its device; called once per use."""
        ...


class BaseHost:
    """Base class of the kinds of host memory.

    Attributes:
        moved: Bytes moved to host memory so far.
    """

    def __init__(self) -> None:
        self.moved = 0
        self._last: weakref.ref[HostGroup] | None = None

    def begin(self) -> HostGroup:
        """Begin a call of a block."""
        group = HostGroup(None if self._last is None else self._last())
        self._last = weakref.ref(group)
        return group

    def end(self) -> None:
        """End the forward of the block that began last."""

    @staticmethod
    def _taken(copy: HostCopy, tensor: Tensor) -> Tensor:
        """Count one use; the last one forgets the tensor on the device."""
        copy.left -= 1
        if copy.left <= 0:  # a second backward over a kept graph fetches again
            copy.fetched, copy.left = None, copy.uses
        return tensor


class _Kept(HostCopy):
    """A copy that may share memory with the tensor itself, which the CPU keeps.

    Attributes:
        version: Version of the tensor when it was saved.
    """

    def __init__(self, host: Tensor, device: torch.device, group: HostGroup) -> None:
        super().__init__(host, device, group)
        self.version = host._version


def _check_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"activations: expected a saved tensor {list(tensor.shape)} at version {version}, got "
            f"version {tensor._version}: an in-place operation modified it after autograd saved "
            "it; use the operation out of place"
        )


class _Leaving:
    """Tensors of one group whose copies may be under way.

    Attributes:
        group: The group.
        tensors: The tensors, and their versions when they were saved.
        done: Event behind the last copy.
    """

    def __init__(self, group: HostGroup) -> None:
        self.group = group
        self.tensors: list[tuple[Tensor, int]] = []
        self.done: Event | None = None

    def release(self, streams: Streams) -> None:
        """Let the compute stream reuse the memory once the copies are complete."""
        if self.done is not None:
            streams.compute_waits(self.done)
        for tensor, version in self.tensors:
            _check_version(tensor, version)
        self.tensors.clear()


class SynchronousHost(BaseHost):
    """Copies that the device waits for. A tensor of the CPU stays where it is."""

    def put(self, tensor: Tensor, group: HostGroup) -> HostCopy:
        """Copy a tensor to host memory."""
        self.moved += tensor.nbytes
        return _Kept(tensor.detach().to("cpu"), tensor.device, group)

    def get(self, copy: HostCopy) -> Tensor:
        """Return a tensor on its device.

        Raises:
            RuntimeError: the tensor was modified in place after autograd saved it.
        """
        if isinstance(copy, _Kept):
            _check_version(copy.host, copy.version)
        if copy.fetched is None:
            copy.fetched = copy.host.to(copy.device)
        return self._taken(copy, copy.fetched)


class CudaHost(BaseHost):
    """Copies on a side stream, to and from pinned memory.

    A tensor that leaves is held until the block after its own has run. Then the compute stream
    waits for the copy, so the allocator may reuse the memory without a record of other streams. A
    tensor that comes back is allocated on the compute stream for the same reason, and is held
    until the compute stream has waited for its copy: backward may never read it.

    Args:
        streams: The streams of the device.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams
        self._leaving: deque[_Leaving] = deque()
        self._coming: dict[HostGroup, list[Tensor]] = {}

    def begin(self) -> HostGroup:
        """Begin a call of a block."""
        group = super().begin()
        for unread in list(self._coming):
            self._arrive(unread)
        self._leaving.append(_Leaving(group))
        return group

    def end(self) -> None:
        """End the forward of a block: the tensors of the block before it are free.

        So the head, where a step often needs most, runs beside the tensors of one block.
        """
        while len(self._leaving) > 1:
            self._leaving.popleft().release(self._streams)

    def put(self, tensor: Tensor, group: HostGroup) -> HostCopy:
        """Copy a tensor to pinned memory, on the side stream."""
        tensor = tensor.detach()
        host = self._streams.pinned_like(tensor)
        self._streams.side_waits()
        self._streams.copy(host, tensor)
        if not self._leaving or self._leaving[-1].group is not group:
            self._leaving.append(_Leaving(group))  # a backward inside the block drained it
        self._leaving[-1].tensors.append((tensor, tensor._version))
        self._leaving[-1].done = self._streams.record()
        self.moved += tensor.nbytes
        return HostCopy(host, tensor.device, group)

    def get(self, copy: HostCopy) -> Tensor:
        """Return a tensor on its device, and begin to fetch those of the block before."""
        while self._leaving:  # what forward still held when backward begins
            self._leaving.popleft().release(self._streams)
        if copy.fetched is None:
            self._fetch(copy.group)
        if copy.group.ready is not None:
            self._arrive(copy.group)
            before = None if copy.group.previous is None else copy.group.previous()
            if before is not None:
                self._fetch(before)
        found = copy.fetched
        assert found is not None  # fetched above
        return self._taken(copy, found)

    def _fetch(self, group: HostGroup) -> None:
        waiting = [copy for copy in group.live() if copy.fetched is None]
        if not waiting:
            return
        tensors = [self._streams.device_like(copy.host, copy.device) for copy in waiting]
        self._streams.side_waits()  # the memory may still be in use on the compute stream
        for copy, tensor in zip(waiting, tensors, strict=True):
            self._streams.copy(tensor, copy.host)
            copy.fetched = tensor
        group.ready = self._streams.record()
        self._coming.setdefault(group, []).extend(tensors)

    def _arrive(self, group: HostGroup) -> None:
        """Let the compute stream wait for what was fetched."""
        if group.ready is not None:
            self._streams.compute_waits(group.ready)
            group.ready = None
        self._coming.pop(group, None)


def _host_for(device: torch.device) -> HostMemory:
    return CudaHost(CudaStreams(device)) if device.type == "cuda" else SynchronousHost()


class HostMemories:
    """The host memory of each device, per thread. Copies and pickles start empty.

    Args:
        make: Makes the host memory of a device.
    """

    def __init__(self, make: Callable[[torch.device], HostMemory] = _host_for) -> None:
        self._make = make
        self._by_device: PerThread[dict[torch.device, HostMemory]] = PerThread(dict)

    def of(self, device: torch.device) -> HostMemory:
        """Return the host memory of a device."""
        found = self._by_device.get()
        if device not in found:
            found[device] = self._make(device)
        return found[device]

    @property
    def moved(self) -> int:
        """Bytes that this thread moved so far."""
        return sum(memory.moved for memory in self._by_device.get().values())
