"""Checkpoints in shards on two ranks that share no disk: each has a working directory of its own.

``/proc/self/cwd`` names another directory in each process, as a path on local disks does.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_peft import PEFT, LoRA
from tests.checkpoint.signal_job import Alone, options_of
from tests.helpers.distributed.jobs import whole
from tests.helpers.lightning_package import pl
from tests.helpers.nets import assert_same, trainer
from tests.helpers.rank_forks import run_ranks
from tests.helpers.streams import Stream

STEPS = 4
NOT_SHARED = "/proc/self/cwd/ckpt"


def fit(place: str, saved: str, source: str | None, steps: int, rank: int) -> None:
    torch.set_num_threads(1)
    own = Path(place) / f"disk-{rank}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    module = Alone()
    pl.seed_everything(1, verbose=False)
    saver: list[Any] = []
    if saved == "callback":
        saver = [pl.callbacks.ModelCheckpoint(every_n_train_steps=2, save_last=True)]
        saver[0].dirpath = NOT_SHARED  # given as an argument, it would be resolved here
    run = trainer(
        PEFT(LoRA(r=4, target_modules="all-linear"), report=False),
        *saver,
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=bool(saver),
        **options_of("folder"),
    )
    run.fit(module, Stream(STEPS), ckpt_path=source)
    if saved != "callback":
        run.save_checkpoint(saved)
    end = {name: whole(t) for name, t in module.state_dict().items()}
    if rank == 0:
        torch.save(end, Path(place) / f"end-{steps}-{source is not None}.pt")


def attempt(place: str, saved: str) -> None:
    """Print the statuses, and which files are left."""
    statuses, seconds = run_ranks(partial(fit, place, saved, None, 2), 2)
    left = sorted(str(p.relative_to(place)) for p in Path(place).rglob("*.pt") if p.is_file())
    print(statuses, round(seconds, 1), left, flush=True)


def refused(place: str) -> None:
    attempt(place, "callback")
    attempt(place, NOT_SHARED + "/by-hand.ckpt")


def at_an_address(place: str) -> None:
    """Save at an fsspec address twice, resume from there, and compare with an uninterrupted run."""
    address = f"file://{place}/remote/last.ckpt"
    for source, steps in ((None, 1), (None, 2), (address, STEPS), (None, STEPS)):
        saved = address if steps < STEPS else f"{place}/end.ckpt"
        statuses, _ = run_ranks(partial(fit, place, saved, source, steps), 2)
        assert statuses == [0, 0], statuses
    print(sorted(p.name.partition("-")[0] for p in Path(place, "remote", "last.ckpt").iterdir()))
    resumed, straight = (
        torch.load(f"{place}/end-{STEPS}-{with_source}.pt", weights_only=True)
        for with_source in (True, False)
    )
    assert_same(resumed, straight)
    print("equal")
