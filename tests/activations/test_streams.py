"""Offloading over two streams that run as late as they may, and memory that is given out again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_peft.activations.host_memory import CudaHost, HostCopy

DEVICE = torch.device("cpu")
WIDTH = 8


class Mark:
    """A point in the queue of a stream."""

    def __init__(self) -> None:
        self.reached = False


class LateStreams:
    """A device with two queues. One of them runs only when the other has to wait for it.

    Freed memory goes to the next allocation at once, as torch's allocator does on one stream.

    Attributes:
        late: The queue that lags, ``"side"`` or ``"compute"``.
    """

    def __init__(self, late: str) -> None:
        self.late = late
        self.queues: dict[str, deque[Callable[[], object]]] = {"side": deque(), "compute": deque()}
        self.free: list[Any] = []
        self.arrays: dict[int, Any] = {}  # by address

    # ---- memory

    def new(self) -> Tensor:
        array = self.free.pop() if self.free else np.zeros(WIDTH, dtype=np.float32)
        tensor = torch.from_numpy(array)
        self.arrays[tensor.data_ptr()] = array
        weakref.finalize(tensor.untyped_storage(), self.free.append, array)
        return tensor

    def memory(self, tensor: Tensor) -> Tensor:
        """Return an alias that does not keep memory from being freed, as a kernel's pointer."""
        array = self.arrays.get(tensor.data_ptr())
        return tensor if array is None else torch.from_numpy(array)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan"))  # never given out again

    def device_like(self, host: Tensor, device: torch.device) -> Tensor:
        return self.new()

    # ---- work

    def give(self, stream: str, work: Callable[[], object]) -> None:
        self.queues[stream].append(work)
        if stream != self.late:
            self.run(stream)

    def run(self, stream: str, until: Mark | None = None) -> None:
        queue = self.queues[stream]
        while queue and not (until is not None and until.reached):
            queue.popleft()()

    def mark(self, stream: str) -> Mark:
        mark = Mark()
        self.give(stream, lambda: setattr(mark, "reached", True))
        return mark

    def waits(self, stream: str, other: str, mark: Mark) -> None:
        self.give(stream, lambda: self.run(other, mark))

    def copy(self, into: Tensor, source: Tensor) -> None:
        into, source = self.memory(into), self.memory(source)
        self.give("side", lambda: into.copy_(source))

    def side_waits(self) -> None:
        self.waits("side", "compute", self.mark("compute"))

    def record(self) -> Mark:
        return self.mark("side")

    def compute_waits(self, event: object) -> None:
        assert isinstance(event, Mark)
        self.waits("compute", "side", event)

    # ---- what a model does

    def compute(self, value: float) -> Tensor:
        """Return a tensor that an operation fills."""
        out = self.new()
        memory = self.memory(out)
        self.give("compute", lambda: memory.fill_(value))
        return out

    def reads(self, tensor: Tensor, seen: list[float]) -> None:
        memory = self.memory(tensor)
        self.give("compute", lambda: seen.append(float(memory.max())))

    def finish(self) -> None:
        for stream in ("compute", "side", "compute"):
            self.run(stream)


def forward(
    streams: LateStreams, host: CudaHost, first: float, blocks: int
) -> list[list[HostCopy]]:
    """Run blocks that save two tensors each; the values are first, first + 1 …"""
    kept = []
    for block in range(blocks):
        group = host.begin()
        copies = []
        for i in range(2):
            value = streams.compute(first + 2 * block + i)
            copy = host.put(value, group)
            copy.uses = copy.left = 1
            copies.append(copy)
            del value
            streams.compute(-1.0)  # takes memory that was freed
        host.end()
        kept.append(copies)
    return kept


def backward(
    streams: LateStreams, host: CudaHost, kept: list[list[HostCopy]], seen: list[float]
) -> None:
    while kept:
        copies = kept.pop()
        while copies:
            found = host.get(copies.pop())
            streams.reads(found, seen)
            del found
            streams.compute(-2.0)


@pytest.mark.parametrize("late", ["side", "compute"])
def test_values_come_back_whichever_stream_lags(late: str) -> None:
    streams = LateStreams(late)
    host = CudaHost(streams)
    for first in (10.0, 50.0):  # the second step takes memory of the first
        kept = forward(streams, host, first, 4)
        seen: list[float] = []
        backward(streams, host, kept, seen)
        streams.finish()
        assert seen == [first + i for i in reversed(range(8))]


@pytest.mark.parametrize("late", ["side", "compute"])
def test_memory_that_backward_never_reads_is_not_overwritten_later(late: str) -> None:
    """Backward ends in the last block; what was fetched for the block before is dropped."""
    streams = LateStreams(late)
    host = CudaHost(streams)
    kept = forward(streams, host, 10.0, 3)
    seen: list[float] = []
    backward(streams, host, kept[2:], seen)
    del kept
    values = [streams.compute(100.0 + i) for i in range(8)]
    for value in values:
        streams.reads(value, seen)
    backward(streams, host, forward(streams, host, 30.0, 2), seen)
    for value in values:
        streams.reads(value, seen)
    streams.finish()
    want = [100.0 + i for i in range(8)]
    assert seen == [15.0, 14.0, *want, 33.0, 32.0, 31.0, 30.0, *want]


def test_the_block_before_is_fetched_while_a_block_runs() -> None:
    streams = LateStreams("side")
    host = CudaHost(streams)
    kept = forward(streams, host, 10.0, 3)
    host.get(kept[2][0])
    assert all(copy.fetched is not None for copy in kept[1])
    assert all(copy.fetched is None for copy in kept[0])
    host.get(kept[1][0])
    assert all(copy.fetched is not None for copy in kept[0])
