"""What the GPU benchmarks share: turns, medians, rows, and the words "not measured"."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

NOT_MEASURED = "not measured"
RESULTS = Path(__file__).parents[1] / "results"
LIBRARIES = ("torch", "triton", "bitsandbytes", "peft", "lightning", "transformers")


def options(description: str, **extra: Any) -> argparse.Namespace:
    """--smoke, --csv and --seconds, and `extra` options by name and default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--csv", type=Path, help="where rows go (default: results/<device>_….csv)")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    chosen = parser.parse_args()
    chosen.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.device.type == "cpu" and not chosen.smoke:
        print("no GPU: rows say 'not measured'; --smoke runs tiny shapes on the CPU")
    return chosen


def runs(chosen: argparse.Namespace) -> bool:
    """Whether anything is measured at all."""
    return chosen.smoke or chosen.device.type == "cuda"


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    made: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds by name; the candidates take turns, so that all meet the same clock."""
    cuda = torch.cuda.is_available()
    # Written before each run, so that no candidate finds its weights in the L2 cache.
    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda") if cuda else None
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(warmup + repeats):
        for name, run in made.items():
            if flush is not None:
                flush.zero_()
            elapsed = _once(run)
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def _once(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed


def spread(times: Sequence[float] | None) -> dict[str, str]:
    """median, p20, p80 in milliseconds."""
    if not times:
        return dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), NOT_MEASURED)
    ordered = sorted(times)
    at = [ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.2, 0.8)]
    median = statistics.median(ordered)
    return {"median_ms": f"{median:.4f}", "p20_ms": f"{at[0]:.4f}", "p80_ms": f"{at[1]:.4f}"}


def ratio(base: Sequence[float] | None, times: Sequence[float] | None) -> str:
    """How many times faster than `base`."""
    if not base or not times:
        return NOT_MEASURED
    return f"{statistics.median(base) / statistics.median(times):.3f}"


def versions() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return "; ".join(found)


def write(chosen: argparse.Namespace, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with device, versions, date and command; a smoke run writes only where it is told."""
    about = {
        "device": device_name(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    path: Path | None = chosen.csv
    if path is None and chosen.device.type == "cuda" and not chosen.smoke:
        path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '_', device_name().lower())}_{name}.csv"
    for row in rows:
        print("  ".join(str(value) for value in row.values()), flush=True)
    if path is None or not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [*rows[0], *about])
        out.writeheader()
        out.writerows({**row, **about} for row in rows)
