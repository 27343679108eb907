"""Times on a device: medians, with the caches of the device flushed between runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch

__all__ = ["medians", "synchronize"]

_FLUSH = 1 << 26  # int32: 256 MB, more than any L2 cache


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(
    ways: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int = 2,
    least: float = 0.0,
    before: Callable[[str], object] | None = None,
) -> dict[str, float]:
    """Return the median time of each way in microseconds; the ways take turns.

    Args:
        ways: What is timed, by name.
        device: Where it runs.
        repeats: Runs of each way.
        warmup: Runs before them that do not count.
        least: Seconds in all below which more runs are made.
        before: Called with the name of a way before each run; its time does not count.
    """
    cuda = device.type == "cuda"
    flush = torch.empty(_FLUSH, dtype=torch.int32, device=device) if cuda else None
    times: dict[str, list[float]] = {name: [] for name in ways}
    start, turn = perf_counter(), 0
    while turn < warmup + repeats or perf_counter() - start < least:
        for name, run in ways.items():
            if before is not None:
                before(name)
            if flush is not None:
                flush.zero_()
            elapsed = _cuda_us(run, device) if cuda else _cpu_us(run)
            if turn >= warmup:
                times[name].append(elapsed)
        turn += 1
    return {name: statistics.median(found) for name, found in times.items()}


def _cpu_us(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return 1e6 * (perf_counter() - start)


def _cuda_us(run: Callable[[], object], device: torch.device) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return 1e3 * float(first.elapsed_time(last))
