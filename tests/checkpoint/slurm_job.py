"""A run under a simulated SLURM: every rank is a node of its own, and `scontrol` is a script.

A rank sends itself or all ranks a signal in the middle of a step. The next start has the arguments
of the first one, as a requeued job has. Prints what was left and "equal" at the end.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_peft import PEFT, LoRA
from tests.checkpoint.signal_job import Alone, options_of
from tests.helpers.distributed.jobs import whole
from tests.helpers.lightning_package import InPackage, fabric, pl
from tests.helpers.nets import assert_same, trainer
from tests.helpers.rank_forks import run_ranks
from tests.helpers.streams import Stream

STEPS, WINDOW, LIMIT = 6, 2, 60.0

#: What SLURM does on `scontrol requeue`: it notes the call and ends the job's processes.
SCONTROL = """#!/bin/sh
echo "$@" >> {log}
trap '' TERM
kill -TERM 0
"""


class Send(InPackage):
    """Sends a signal in the middle of a batch, when other ranks may be in a collective."""

    lightning_base = "Callback"

    def __init__(self, number: int, rank: int, everyone: bool, at: int) -> None:
        self.number, self.rank, self.everyone, self.at = number, rank, everyone, at

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank != self.rank or trainer.fit_loop.total_batch_idx != self.at:
            return
        if self.everyone:
            os.killpg(os.getpgid(0), self.number)
        else:
            os.kill(os.getpid(), self.number)


def fit(place: Path, strategy: str, requeue: bool, ranks: int, send: Send | None) -> None:
    torch.set_num_threads(1)
    environment = fabric().plugins.environments.SLURMEnvironment
    options = {**options_of(strategy), "devices": 1, "num_nodes": ranks}
    module = Alone()
    pl.seed_everything(1, verbose=False)
    run = trainer(
        PEFT(LoRA(r=4, target_modules="all-linear"), report=False),
        pl.callbacks.ModelCheckpoint(place / "ckpt", save_last=True, every_n_train_steps=4),
        *([] if send is None else [send]),
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=WINDOW,
        default_root_dir=place,
        plugins=[environment(auto_requeue=requeue)],
        **options,
    )
    run.fit(module, Stream(STEPS * WINDOW), ckpt_path=None if requeue else "last")
    end = {name: whole(t) for name, t in module.state_dict().items()}
    if run.is_global_zero:
        torch.save(end, place / "end.pt")


def as_task(
    place: Path, strategy: str, requeue: bool, ranks: int, send: Send | None, rank: int
) -> None:
    """Set what `srun` sets, then fit."""
    os.environ |= {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(ranks),
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank),
        "SLURM_LOCALID": "0",
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
    }
    os.environ.setdefault("MASTER_PORT", "29501")  # one rank never listens
    fit(place, strategy, requeue, ranks, send)


def prepare(place: Path) -> None:
    tool = place / "bin" / "scontrol"
    tool.parent.mkdir(parents=True)
    tool.write_text(SCONTROL.format(log=place / "scontrol.log"))
    tool.chmod(0o755)


def main(place: str, strategy: str, requeue: bool, name: str, everyone: bool) -> None:
    ranks = 1 if not strategy else 2
    folder, uninterrupted = Path(place) / "parts", Path(place) / "whole"
    prepare(folder)
    prepare(uninterrupted)
    send = Send(getattr(signal, name), ranks - 1, everyone, at=4)
    statuses, seconds = run_ranks(
        partial(as_task, folder, strategy, requeue, ranks, send), ranks, LIMIT
    )
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*ckpt*"))  # files, folders
    log = folder / "scontrol.log"
    print("statuses", statuses, "seconds", round(seconds, 1), flush=True)
    print("left", left, flush=True)
    print("scontrol", log.read_text().split("\n")[:-1] if log.exists() else [], flush=True)
    for at in (folder, uninterrupted):
        statuses, _ = run_ranks(partial(as_task, at, strategy, requeue, ranks, None), ranks, LIMIT)
        assert set(statuses) == {0}, statuses
    ended, straight = (torch.load(f / "end.pt", weights_only=True) for f in (folder, uninterrupted))
    assert_same(ended, straight)
    print("equal")
