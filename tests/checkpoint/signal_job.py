"""A run that gets signals at random moments, with accumulation, 8-bit state and an EMA teacher.

Each start is forked from one process, per rank. It resumes with ``ckpt_path="last"``. A signal goes
to one rank or to all. Prints one line per signal and "equal" at the end.
"""

from __future__ import annotations

import copy
import importlib
import os
import random
import shutil
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
from tests.helpers.distributed.jobs import whole
from tests.helpers.lightning_package import InPackage, current, pl
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


class Alone(InPackage):
    """A student without a teacher: FSDP shards the adapted part alone, and averages mix both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.randn(self.global_rank)  # every rank has a random state of its own
        seen = (1 + self.global_rank) * batch + 0.1 * torch.randn_like(batch)
        return (self.student(seen) - batch).square().mean()

    configure_optimizers = Taught.configure_optimizers


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


class InSave(Signal):
    """Sends the signal before the n-th rename of a written file."""

    def event(self, name: str) -> None:
        if name == "before-replace":
            super().event(name)


#: Ranks and arguments of the Trainer.
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "": (1, {}),
    "ddp": (2, {"strategy": "peft_ddp"}),
    "fsdp": (2, {"strategy": "peft_fsdp"}),
    "folder": (2, {}),
}


def options_of(strategy: str) -> dict[str, Any]:
    ranks, options = STRATEGIES[strategy]
    if strategy == "folder":
        package = importlib.import_module(
            f"lightning_peft.strategies.{current().partition('.')[0]}"
        )
        options = {"strategy": package.PEFTFSDPStrategy(save_distributed_checkpoint=True)}
    return {"devices": ranks, **options}


def fit(folder: Path, strategy: str, *callbacks: Any) -> Any:
    saver = pl.callbacks.ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=2, enable_version_counter=False
    )
    method = LoRA(r=4, target_modules="all-linear")
    module = Taught() if strategy in ("", "ddp") else Alone()
    pl.seed_everything(1, verbose=False)
    run = trainer(
        PEFT(method, optimizer="adamw_8bit", report=False),
        saver,
        *callbacks,
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=WINDOW,
        **options_of(strategy),
    )
    run.fit(module, Stream(STEPS * WINDOW), ckpt_path="last")
    assert run.global_step == STEPS
    end = {name: whole(t) for name, t in module.state_dict().items()}
    if run.is_global_zero:
        torch.save(end, folder / "end.pt")
    return run


def fit_with(
    folder: Path, strategy: str, signals: Mapping[int, Callable[[], Signal]], rank: int
) -> None:
    fit(folder, strategy, *(signals[rank]() for _ in range(rank in signals)))


def kill_a_folder_save(place: str) -> None:
    """Kill each rank in its second save; print what is left then and after the next start."""
    torch.set_num_threads(1)
    for rank in (0, 1):
        folder = Path(place) / str(rank)
        blow = partial(InSave, 2, signal.SIGKILL, Path(place) / "signals", False)
        statuses, _ = run_ranks(partial(fit_with, folder, "folder", {rank: blow}), 2, LIMIT)
        assert statuses[rank] == -signal.SIGKILL, statuses
        print(f"killed {rank}:", temporary_files(folder), flush=True)
        statuses, _ = run_ranks(partial(fit_with, folder, "folder", {}), 2, LIMIT)
        assert statuses == [0, 0], statuses
        print(f"resumed {rank}:", temporary_files(folder), flush=True)


def temporary_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if ".tmp-" in p.name)


def main(place: str, count: int, seed: int, strategy: str = "") -> None:
    parts, whole, log = Path(place) / "parts", Path(place) / "whole", Path(place) / "signals"
    draw, slowest, ranks = random.Random(seed), 0.0, STRATEGIES[strategy][0]
    torch.set_num_threads(1)
    log.touch()
    for i, number in enumerate(SIGNALS):
        while (sent := len(log.read_text().splitlines())) < (i + 1) * count:
            rank, everyone = draw.randrange(ranks), ranks > 1 and draw.random() < 0.3
            blow = partial(Signal, draw.randrange(1, 60), number, log, everyone)
            run = partial(fit_with, parts, strategy, {rank: blow})
            statuses, seconds = run_ranks(run, ranks, LIMIT)
            slowest = max(slowest, seconds)
            if len(log.read_text().splitlines()) == sent:
                assert set(statuses) == {0}, statuses  # the run ended before the signal
            if not any(statuses):
                shutil.rmtree(parts)
    for folder in (parts, whole):
        statuses, seconds = run_ranks(partial(fit_with, folder, strategy, {}), ranks, LIMIT)
        assert set(statuses) == {0}, statuses
        slowest = max(slowest, seconds)
    ended, uninterrupted = (torch.load(f / "end.pt", weights_only=True) for f in (parts, whole))
    assert_same(ended, uninterrupted)
    assert not temporary_files(parts), temporary_files(parts)
    print(log.read_text(), end="")
    print(f"slowest {slowest:.1f} s")
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
