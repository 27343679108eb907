"""A run that gets signals at random moments, with accumulation, 8-bit state and an EMA teacher.

Each start is forked from one process. It resumes with ``ckpt_path="last"``. Prints one line per
signal and "equal" at the end.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA
from tests.checkpoint.kill_job import Blow
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import assert_same, trainer
from tests.helpers.streams import Stream

STEPS, WINDOW = 12, 4


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
        seen = batch + 0.1 * torch.randn_like(batch)  # draws from torch's random state
        return (self.student(seen) - self.teacher(batch) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Signal(Blow):
    """Sends a signal to the own process at the n-th event."""

    def __init__(self, n: int, number: int) -> None:
        super().__init__(n)
        self.number = number

    def event(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            print(signal.Signals(self.number).name, "at", name, flush=True)
            os.kill(os.getpid(), self.number)


def fit(folder: Path, *callbacks: Any) -> Any:
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
    )
    run.fit(module, Stream(STEPS * WINDOW), ckpt_path="last")
    return run


def main(place: str, count: int, seed: int) -> None:
    folder, draw, slowest = Path(place), random.Random(seed), 0.0
    torch.set_num_threads(1)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        for _ in range(count):
            event, start = draw.randrange(1, 60), time.perf_counter()
            pid = os.fork()
            if not pid:
                try:
                    fit(folder / "parts", Signal(event, number))
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            slowest = max(slowest, time.perf_counter() - start)
            newest = folder / "parts" / "last.ckpt"
            done = newest.exists() and torch.load(newest, weights_only=True)["global_step"]
            if done == STEPS:
                for file in (folder / "parts").iterdir():
                    file.unlink()
    ended, uninterrupted = fit(folder / "parts"), fit(folder / "whole")
    assert ended.global_step == uninterrupted.global_step == STEPS
    assert_same(
        dict(ended.lightning_module.state_dict()),
        dict(uninterrupted.lightning_module.state_dict()),
    )
    left = sorted(p.name for p in (folder / "parts").iterdir() if ".tmp-" in p.name)
    assert not left, left
    print(f"slowest {slowest:.1f} s")
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
