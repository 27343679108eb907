"""A run that gets signals at random moments, with accumulation, 8-bit state and an EMA teacher.

Each start is forked from one process, per rank. It resumes with ``ckpt_path="last"``. A signal goes
to one rank or to all. Prints one line per signal and "equal" at the end.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA
from tests.checkpoint.kill_job import Blow
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import assert_same, trainer
from tests.helpers.rank_forks import run_ranks
from tests.helpers.streams import Stream

STEPS, WINDOW, LIMIT = 12, 4, 60.0
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


class Taught(InPackage):
    """A student that learns from an average of itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():  # callbacks save before the module's own on_train_batch_end
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, 0.1)
        torch.randn(self.global_rank)  # every rank has a random state of its own
        seen = (1 + self.global_rank) * batch + 0.1 * torch.randn_like(batch)
        return (self.student(seen) - self.teacher(batch) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Signal(Blow):
    """Sends a signal to the own process, or to its group, at the n-th event."""

    def __init__(self, n: int, number: int, sent: Path, everyone: bool) -> None:
        super().__init__(n)
        self.number, self.sent, self.everyone = number, sent, everyone

    def event(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            whom = "all" if self.everyone else "one"
            with self.sent.open("a") as log:
                log.write(f"{signal.Signals(self.number).name} to {whom} at {name}\n")
            (os.killpg if self.everyone else os.kill)(
                os.getpgid(0) if self.everyone else os.getpid(), self.number
            )


def fit(folder: Path, ranks: int, *callbacks: Any) -> Any:
    saver = pl.callbacks.ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=2, enable_version_counter=False
    )
    method = LoRA(r=4, target_modules="all-linear")
    module = Taught()
    pl.seed_everything(1, verbose=False)
    run = trainer(
        PEFT(method, optimizer="adamw_8bit", report=False),
        saver,
        *callbacks,
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=WINDOW,
        **({"devices": ranks, "strategy": "peft_ddp"} if ranks > 1 else {}),
    )
    run.fit(module, Stream(STEPS * WINDOW), ckpt_path="last")
    assert run.global_step == STEPS
    if run.is_global_zero:
        torch.save(dict(module.state_dict()), folder / "end.pt")
    return run


def fit_with(
    folder: Path, ranks: int, signals: Mapping[int, Callable[[], Signal]], rank: int
) -> None:
    fit(folder, ranks, *(signals[rank]() for _ in range(rank in signals)))


def main(place: str, count: int, seed: int, ranks: int = 1) -> None:
    parts, whole, log = Path(place) / "parts", Path(place) / "whole", Path(place) / "signals"
    draw, slowest = random.Random(seed), 0.0
    torch.set_num_threads(1)
    log.touch()
    for i, number in enumerate(SIGNALS):
        while (sent := len(log.read_text().splitlines())) < (i + 1) * count:
            rank, everyone = draw.randrange(ranks), ranks > 1 and draw.random() < 0.3
            blow = partial(Signal, draw.randrange(1, 60), number, log, everyone)
            run = partial(fit_with, parts, ranks, {rank: blow})
            statuses, seconds = run_ranks(run, ranks, LIMIT)
            slowest = max(slowest, seconds)
            if len(log.read_text().splitlines()) == sent:
                assert set(statuses) == {0}, statuses  # the run ended before the signal
            if not any(statuses):
                for file in parts.iterdir():
                    file.unlink()
    for folder in (parts, whole):
        statuses, seconds = run_ranks(partial(fit_with, folder, ranks, {}), ranks, LIMIT)
        assert set(statuses) == {0}, statuses
        slowest = max(slowest, seconds)
    ended, uninterrupted = (torch.load(f / "end.pt", weights_only=True) for f in (parts, whole))
    assert_same(ended, uninterrupted)
    left = sorted(p.name for p in parts.iterdir() if ".tmp-" in p.name)
    assert not left, left
    print(log.read_text(), end="")
    print(f"slowest {slowest:.1f} s")
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
