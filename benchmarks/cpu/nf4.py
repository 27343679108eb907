"""4-bit quantising and dequantising on a CPU: ours and bitsandbytes, interleaved in one process."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional
from lightning_peft_kernels.nf4.ops import dequantize_4bit, quantize_4bit

SHAPES = [(4096, 2048), (4096, 4096)]
COLUMNS = [
    "op", "shape", "dtype", "nested", "threads", "repeats", "bnb_ms", "ours_ms", "ratio",
    "ours_million_a_second", "device", "torch", "bitsandbytes", "date", "command",
]  # fmt: skip


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds; the runs take turns, so that both meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        order = list(runs.items())
        for name, run in order if turn % 2 else order[::-1]:
            start = time.perf_counter()
            result = run()
            elapsed = 1e3 * (time.perf_counter() - start)
            del result
            if turn:
                times[name].append(elapsed)
    return times


def cases(
    shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> dict[str, dict[str, Callable[[], Any]]]:
    W = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(W, compress_statistics=nested, quant_type="nf4")
    q = quantize_4bit(W, double_quant=nested)
    reused = torch.empty(shape, dtype=dtype)
    theirs = {"bnb": lambda: functional.dequantize_4bit(packed, state)}
    return {
        "dequantize": {**theirs, "ours": lambda: dequantize_4bit(q, shape, dtype)},
        "dequantize into a buffer": {
            **theirs,
            "ours": lambda: dequantize_4bit(q, shape, dtype, out=reused),
        },
        "quantize": {
            "bnb": lambda: functional.quantize_4bit(
                W, compress_statistics=nested, quant_type="nf4"
            ),
            "ours": lambda: quantize_4bit(W, double_quant=nested),
        },
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--smoke", action="store_true", help="tiny; nothing is written")
    options = parser.parse_args()
    shapes, repeats = ([(64, 128)], 2) if options.smoke else (SHAPES, options.repeats)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in shapes:
            for dtype in (torch.bfloat16, torch.float32):
                for nested in (True, False):
                    torch.manual_seed(0)
                    for op, runs in cases(shape, dtype, nested).items():
                        turns = repeats if op == "quantize" else 3 * repeats  # short ones: more
                        times = interleaved(runs, turns)
                        bnb, ours = (statistics.median(times[k]) for k in ("bnb", "ours"))
                        row = [op, f"{shape[0]}x{shape[1]}", str(dtype)[6:], nested, threads]
                        row += [turns, f"{bnb:.2f}", f"{ours:.2f}", f"{bnb / ours:.2f}"]
                        row += [f"{shape[0] * shape[1] / ours / 1e3:.0f}", processor()]
                        row += [torch.__version__, bitsandbytes.__version__]
                        rows.append([*row, datetime.date.today(), " ".join(sys.argv)])
                        print(*row[:10], flush=True)
    if options.smoke:
        return
    path = Path(__file__).parents[1] / "results" / "nf4_cpu.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
