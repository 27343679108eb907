"""The one command for a new GPU: its tests, every kernel checked, the ways raced, the times taken.

    python benchmarks/gpu/first_day.py [--minutes 10] [--out FOLDER] [--smoke]

runs, each within its share of the time:

1. `pytest -m gpu tests/kernels`;
2. `lightning-peft check --tune`: verdicts and winners, which later runs of this machine follow;
3. `lightning-peft bench`, after tuning.

Kernels compile on the host, in several processes where there are cores for them.

What each step prints goes to the screen and to FOLDER (default: benchmarks/results/first_day), the
line of `bench` also to benchmarks/results/bench.jsonl. A step that fails is named at the end, and
the next ones run. With --smoke all of it takes tiny sizes, on a CPU too, and writes to FOLDER only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
#: Seconds that an interrupted step has to end.
_TO_END = 20.0


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: What it is called.
        command: Arguments of Python.
        share: Its share of the minutes; what it does not use is left to the next steps.
        good: Exit codes that are no failure.
    """

    name: str
    command: Sequence[str]
    share: float
    good: tuple[int, ...] = (0,)


def steps(chosen: argparse.Namespace, folder: Path) -> list[Step]:
    """The commands; the shares of the first two are limits, the last takes what is asked."""
    lightning_peft = ("-m", "lightning_peft")
    jobs = max(1, min(4, (os.cpu_count() or 1) // 3))
    line = folder / "bench.jsonl" if chosen.smoke else RESULTS / "bench.jsonl"
    if chosen.smoke:
        check = ("check", "--short", "--ops", "output_scale", "--tune", "--shape", "64", "128", "8")
        bench = ("bench", "--smoke", "--out", str(line))
    else:
        check = ("check", "--tune", "--jobs", str(jobs))
        bench = ("bench", "--minutes", f"{0.35 * chosen.minutes:.2f}", "--out", str(line))
    tests = ("-m", "pytest", "-q", "-m", "gpu", "tests/kernels", *_workers(jobs))
    without_a_gpu = (0, 5) if chosen.smoke else (0,)  # 5: no test was selected, or all skipped
    return [
        Step("tests", tests, 0.25, without_a_gpu),
        Step("check", (*lightning_peft, *check), 0.3),
        Step("bench", (*lightning_peft, *bench), 0.45),
    ]


def _workers(jobs: int) -> tuple[str, ...]:
    """Options by which pytest runs several processes; none without pytest-xdist."""
    spread = jobs > 1 and importlib.util.find_spec("xdist") is not None
    return ("-n", str(jobs)) if spread else ()


def run(step: Step, folder: Path, seconds: float) -> str:
    """Run a step, print and keep its output; return why it failed, or ""."""
    paths = [str(ROOT / "triton_kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = time.monotonic()
    with (folder / f"{step.name}.txt").open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None  # Popen was given PIPE
        # An interrupt, so that pytest prints what it has and a check ends its processes.
        limits = [
            threading.Timer(seconds, process.send_signal, [signal.SIGINT]),
            threading.Timer(seconds + _TO_END, process.kill),
        ]
        for limit in limits:
            limit.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
        status = process.wait()
        for limit in limits:
            limit.cancel()
    taken = time.monotonic() - started
    print(f"--- {step.name}: {taken:.0f} s, exit status {status}", flush=True)
    if taken >= seconds:
        return f"{step.name}: stopped after {seconds:.0f} s"
    return "" if status in step.good else f"{step.name}: exit status {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all steps (default: 10)")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_day", help="folder of outputs")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() and not chosen.smoke:
        print("first_day: expected a CUDA device, got none; --smoke runs tiny sizes on the CPU")
        return 2
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    folder: Path = chosen.out / re.sub(r"[^a-z0-9]+", "_", name.lower())
    folder.mkdir(parents=True, exist_ok=True)
    left, failed = 60 * chosen.minutes, []
    every = steps(chosen, folder)
    for i, step in enumerate(every):
        started = time.monotonic()
        rest = sum(later.share for later in every[i:])
        failed.append(run(step, folder, left * step.share / rest))
        left -= time.monotonic() - started
    told = [why for why in failed if why]
    print("\n".join(told) if told else f"all steps passed; outputs are in {folder}")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
