"""What the CPU benchmarks share: candidates take turns in one process; medians, spread, ratios."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, the candidates one after the other in every turn."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + warmup):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
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


def write(name: str, table: list[dict[str, Any]]) -> None:
    """Print the table and put it into benchmarks/results/<name>.csv with where it is from."""
    origin = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": " ".join(f"{p} {version(p)}" for p in PACKAGES),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    for row in table:
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *origin], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **origin} for row in table)
