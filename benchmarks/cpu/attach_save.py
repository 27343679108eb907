"""Attaching LoRA, saving a checkpoint and steps of LoRA and QLoRA, of two checkouts of the package.

    git worktree add ../before COMMIT
    python benchmarks/cpu/attach_save.py --before ../before

Processes take turns: the former checkout, this one, and the former one again as the control. A
figure is the median over the turns of a process's median CPU time, so that other work on the
machine counts little; a ratio is the median over the turns of the ratio within a turn.
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
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parents[2]
WIDTHS = {40: (320, 6), 400: (1024, 7)}  # hidden size and blocks by megabytes of an fp32 base
ATTACHES = {40: 8, 400: 3}
STEPS = {40: 12, 400: 4}
TOKENS = {40: 64, 400: 16}
MEASURES = ("attach", "save", "LoRA step", "QLoRA step")


class Block(nn.Module):
    """The projections of a Llama block; the mixing of tokens is left out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        for name in ("gate", "up"):
            setattr(self, name, nn.Linear(width, width * 27 // 10, bias=False))
        self.down = nn.Linear(width * 27 // 10, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        x = x + self.o(self.v(n) * torch.sigmoid(self.q(n) * self.k(n)))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """Embedding, blocks and head of a Llama's shapes in fp32."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        width, blocks = WIDTHS[megabytes]
        self.embed = nn.Embedding(width * 13, width)
        self.layers = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, width * 13, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layers(self.embed(tokens))), tokens)


def timed(call: Callable[..., object], *args: object, **options: object) -> float:
    """Milliseconds of this process's work in one call."""
    gc.collect()
    start = time.process_time()
    call(*args, **options)
    return 1e3 * (time.process_time() - start)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)


def attach_and_save(megabytes: int) -> dict[str, list[float]]:
    from lightning_peft import LoRA, attach, save_checkpoint

    seen: dict[str, list[float]] = {"attach": [], "save": []}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.ckpt")
        for turn in range(ATTACHES[megabytes] + 1):
            net = Model(megabytes)
            attached = timed(attach, net, LoRA(r=8, target_modules="all-linear"))
            optimizer = optimizer_of(net)
            saved = [timed(save_checkpoint, net, path, optimizer=optimizer) for _ in "ab"]
            if turn:
                seen["attach"].append(attached)
                seen["save"] += saved
    return seen


def steps(megabytes: int, kind: str | None) -> list[float]:
    from lightning_peft import LoRA, Quantization, attach

    net = Model(megabytes)
    packing = None if kind is None else Quantization(kind)
    attach(net, LoRA(r=8, target_modules="all-linear"), quantization=packing)
    optimizer = optimizer_of(net)
    tokens = torch.arange(TOKENS[megabytes])

    def step() -> None:
        optimizer.zero_grad()
        net(tokens).backward()
        optimizer.step()

    return [timed(step) for _ in range(STEPS[megabytes] + 2)][2:]


def child() -> None:
    """Time the package that is imported here; print the medians as JSON."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    for megabytes in WIDTHS:
        seen = attach_and_save(megabytes)
        seen["LoRA step"] = steps(megabytes, None)
        seen["QLoRA step"] = steps(megabytes, "nf4")
        found |= {f"{megabytes} {what}": statistics.median(ms) for what, ms in seen.items()}
    print(json.dumps(found))


def run(checkout: Path) -> dict[str, float]:
    """Time one checkout in a process of its own."""
    path = os.pathsep.join([str(checkout), str(checkout / "triton_kernels")])
    done = subprocess.run(
        [sys.executable, __file__, "--child"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
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
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--remark", default="")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from benchmarks.lib.side_by_side import RESULTS, write

    places = {"before": options.before, "now": HERE, "again": options.before}
    turns = []
    for turn in range(options.turns):
        turns.append({name: run(place.resolve()) for name, place in places.items()})
        print(f"turn {turn + 1} of {options.turns} done", file=sys.stderr)
    table = []
    for megabytes in WIDTHS:
        for measure in MEASURES:
            key = f"{megabytes} {measure}"
            row: dict[str, object] = {"megabytes": megabytes, "measure": measure}
            for name in places:
                row[f"{name}_ms"] = round(statistics.median(t[name][key] for t in turns), 2)
            for name, column in (("now", "ratio"), ("again", "control")):
                ratios = [t[name][key] / t["before"][key] for t in turns]
                row[column] = round(statistics.median(ratios), 3)
                row[f"{column}_range"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
            table.append({**row, "turns": options.turns})
    torch.set_num_threads(1)
    write("attach_save", table, remark=options.remark)
    print(RESULTS / "attach_save.csv")


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child()
    else:
        main()
