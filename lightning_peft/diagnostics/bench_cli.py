"""The command `lightning-peft bench`."""

from __future__ import annotations

import argparse
import datetime
import math
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from lightning_peft_kernels.races import read_races
from lightning_peft_kernels.verdicts import device_key, read_verdicts

from lightning_peft.core.commands import Commands
from lightning_peft.diagnostics.bench_models import SMOKE, USUAL
from lightning_peft.diagnostics.bench_report import BenchResult, markdown_table
from lightning_peft.diagnostics.bench_rows import Row, measure
from lightning_peft.diagnostics.check_runner import ensure_checked
from lightning_peft.diagnostics.cli import device_named

__all__ = ["add_bench", "run_bench"]

_PACKAGES = ("lightning_peft", "bitsandbytes", "peft", "transformers", "lightning")
_SMOKE_SECONDS = 1.0


def add_bench(commands: Commands) -> None:
    """Add the command to the program's subparsers."""
    bench = commands.add_parser(
        "bench", help="the times that decide, against peft and bitsandbytes, on this GPU"
    )
    bench.set_defaults(run=_run)
    bench.add_argument("--minutes", type=float, default=5.0, help="time for all rows (default: 5)")
    bench.add_argument("--device", help="cuda:0 …; default: the current one")
    bench.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too, in seconds")
    bench.add_argument("--out", type=Path, help="append the line of JSON to this file")


def run_bench(device: torch.device, minutes: float, *, smoke: bool = False) -> BenchResult:
    """Measure and return all rows; they are printed as they come.

    Args:
        device: A CUDA device; a smoke run takes a CPU too.
        minutes: Time for all rows, beyond building models.
        smoke: Whether sizes are tiny.

    Raises:
        RuntimeError: There is no CUDA device and the run is not a smoke run.
    """
    if device.type != "cuda" and not smoke:
        raise RuntimeError(
            "bench: expected a CUDA device, got none; --smoke runs tiny sizes on the CPU, whose "
            "times say nothing about a GPU"
        )
    key = device_key(device)
    if device.type == "cuda":
        ensure_checked(device)
    verdicts = read_verdicts(key).values()
    bad = [f"{v.op} ({v.configuration}): {v.outcome}" for v in verdicts if v.outcome != "ok"]
    sizes = SMOKE if smoke else USUAL
    rows: list[Row] = []
    for row in measure(sizes, device, _SMOKE_SECONDS if smoke else 60 * minutes):
        value = row.value if isinstance(row.value, str) else f"{row.value:.4g} {row.unit}"
        print(f"{row.name:<40} {value}", flush=True)
        rows.append(row)
    kernels = {"checked": len(verdicts), "bad": bad, "races": len(read_races(key))}
    return BenchResult.of({**key, **_environment()}, asdict(sizes), kernels, rows)


def _environment() -> dict[str, str]:
    found = {"date": datetime.date.today().isoformat()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _run(given: argparse.Namespace) -> None:
    if not 0 < given.minutes < math.inf:
        raise ValueError(f"bench: expected finite --minutes > 0, got {given.minutes}")
    device = device_named(given.device, "bench")
    if given.out is not None:
        _require_writable(given.out)
    result = run_bench(device, given.minutes, smoke=given.smoke)
    line = result.line()
    print(f"\n{markdown_table([result])}\n\n{line}", flush=True)
    if given.out is not None:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _require_writable(path: Path) -> None:
    """Raise before minutes are spent on rows that cannot be appended."""
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
        if new:
            path.unlink()
    except OSError as error:
        raise OSError(
            f"bench: expected --out as a file that can be appended to, got {path}: "
            f"{error.strerror or error}; give another path"
        ) from error
