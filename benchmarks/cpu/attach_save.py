"""Attaching LoRA and saving a checkpoint, of two checkouts of the package.

    git worktree add ../before COMMIT
    python benchmarks/cpu/attach_save.py --before ../before --megabytes 40

Processes take turns: the former checkout, this one, and the former one again as the control. Each
process reports its minimum and its median; a row holds the medians of the processes, and the median
ratio to the former checkout's process of the same turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parents[2]
WIDTHS = {40: (320, 6), 400: (1024, 7)}  # hidden size and blocks by megabytes


def model(megabytes: int) -> nn.Module:
    """Embedding, blocks and head of a Llama's shapes in fp32."""
    width, blocks = WIDTHS[megabytes]

    def block() -> nn.ModuleDict:
        square = {name: nn.Linear(width, width, bias=False) for name in ("q", "k", "v", "o")}
        wide = {name: nn.Linear(width, width * 27 // 10, bias=False) for name in ("gate", "up")}
        down = nn.Linear(width * 27 // 10, width, bias=False)
        return nn.ModuleDict({**square, **wide, "down": down, "norm": nn.RMSNorm(width)})

    tokens = width * 13
    parts = {"embed": nn.Embedding(tokens, width), "head": nn.Linear(width, tokens, bias=False)}
    return nn.ModuleDict({**parts, "layers": nn.ModuleList(block() for _ in range(blocks))})


def timed(call: Callable[..., object], *args: object, **options: object) -> tuple[float, float]:
    """Milliseconds of one call: of the clock, and of this process's work."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    call(*args, **options)
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def child(megabytes: int, threads: int, repeats: int) -> None:
    """Time the package that is imported here; print the figures as JSON."""
    from lightning_peft import LoRA, attach, save_checkpoint

    torch.set_num_threads(threads)
    seen: dict[str, list[tuple[float, float]]] = {"attach": [], "save": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):
            net = model(megabytes)
            attached = timed(attach, net, LoRA(r=8, target_modules="all-linear"))
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
            path = os.path.join(folder, "a.ckpt")
            saved = [timed(save_checkpoint, net, path, optimizer=optimizer) for _ in "ab"]
            if turn:
                seen["attach"].append(attached)
                seen["save"] += saved
    figures = {
        f"{what} {clock} {name}": summary(t[i] for t in times)
        for what, times in seen.items()
        for i, clock in enumerate(("wall", "cpu"))
        for name, summary in (("min", min), ("median", statistics.median))
    }
    print(json.dumps(figures))


def run(checkout: Path, options: argparse.Namespace) -> dict[str, float]:
    """Time one checkout in a process of its own."""
    path = os.pathsep.join([str(checkout), str(checkout / "triton_kernels")])
    sizes = [str(n) for n in (options.megabytes, options.threads, options.repeats)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", *sizes],
        env={**os.environ, "PYTHONPATH": path},
        cwd=checkout,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, required=True, help="a checkout to compare with")
    parser.add_argument("--megabytes", type=int, choices=sorted(WIDTHS), default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="per process")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--remark", default="")
    options = parser.parse_args()
    from benchmarks.lib.side_by_side import RESULTS, write

    places = {"before": options.before, "now": HERE, "before again": options.before}
    turns = [
        {name: run(place.resolve(), options) for name, place in places.items()}
        for _ in range(options.turns)
    ]
    table = [
        {
            "megabytes": options.megabytes,
            "threads": options.threads,
            "measure": measure,
            "candidate": name,
            "ms": round(statistics.median(turn[name][measure] for turn in turns), 2),
            "ratio": round(
                statistics.median(t[name][measure] / t["before"][measure] for t in turns), 3
            ),
            "turns": options.turns,
        }
        for measure in turns[0]["now"]
        for name in places
    ]
    torch.set_num_threads(options.threads)
    name = f"attach_save_{options.megabytes}mb_{options.threads}_threads"
    write(name, table, remark=options.remark)
    print(RESULTS / f"{name}.csv")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(int, sys.argv[2:]))
    else:
        main()
