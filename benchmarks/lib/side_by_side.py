"""What the CPU benchmarks share: candidates take turns in one process; medians, spread, ratios."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

Name = TypeVar("Name", bound=Hashable)
RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def interleaved(
    candidates: Mapping[Name, Callable[[], Any]],
    repeats: int,
    warmup: int = 2,
    *,
    again: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of each call; the candidates take turns, the last of a turn first in the next.

    Args:
        candidates: By name.
        repeats: Timed calls of each.
        warmup: Turns before them.
        again: Untimed calls before each timed one: a step of training follows a step of its own,
            not what another candidate leaves of caches and of free memory.
        clock: Seconds; `time.process_time` counts the work of this process alone, which is steadier
            on a machine that is shared.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    for turn in range(repeats + warmup):
        for name, call in order[:: -1 if turn % 2 else 1]:
            for _ in range(again):
                call()
            start = clock()
            call()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def rows(
    seconds: Mapping[str, list[float]], reference: str, **columns: Any
) -> list[dict[str, Any]]:
    """One row a candidate: median, interquartile range, ratio of medians to the reference's."""
    base = statistics.median(seconds[reference])
    made = []
    for name, times in seconds.items():
        quartiles = (
            statistics.quantiles(times, n=4) if len(times) > 3 else [min(times), 0, max(times)]
        )
        median = statistics.median(times)
        made.append(
            {
                **columns,
                "candidate": name,
                "median_ms": round(1e3 * median, 3),
                "iqr_ms": round(1e3 * (quartiles[2] - quartiles[0]), 3),
                "ratio": round(median / base, 3),
                "reference": reference,
                "repeats": len(times),
            }
        )
    return made


def traced_peak(model: nn.Module, step: Callable[[], Any], steps: int) -> int:
    """Bytes at the fullest moment of some steps: every allocation and release that torch's profiler
    sees, on top of what the model holds before them.
    """
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers()]
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        for _ in range(steps):
            step()
    return sum(held.values()) + fullest_moment(prof)


def fullest_moment(traced: profile) -> int:
    """Bytes at the fullest moment of a trace, beyond those before it.

    Buffers of gloo's own are left out: a thread frees them at any time after the collective.
    """
    events = list(traced.profiler.kineto_results.events())  # type: ignore[union-attr]
    calls = [
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        if e.name().startswith("gloo:")
    ]
    now = top = 0
    buffers: list[int] = []
    for at, n in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        if n > 0 and any(start <= at <= end for start, end in calls):
            buffers.append(n)
        elif -n in buffers:
            buffers.remove(-n)
        else:
            now += n
            top = max(top, now)
    return top


def _script() -> str:
    """The script as it is named from the root of the repository."""
    path = Path(sys.argv[0]).resolve()
    root = Path(__file__).parents[2]
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def write(
    name: str,
    table: list[dict[str, Any]],
    *,
    remark: str = "",
    before: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Print the table and put it into benchmarks/results/<name>.csv with where it is from.

    Args:
        name: Name of the file.
        table: The rows.
        remark: What else is to be known of this run.
        before: Complete rows of earlier runs, which come first.
    """
    origin = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": " ".join(f"{p} {version(p)}" for p in PACKAGES),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", _script(), *sys.argv[1:]]),
        **({"remark": remark} if remark or before else {}),
    }
    for row in table:
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *origin], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(before)
        writer.writerows({**row, **origin} for row in table)
