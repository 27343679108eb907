"""Stages on two processes whose dataloaders differ in length. Prints each rank's message."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.helpers.lightning_package import current
from tests.helpers.nets import CLASSES, FEATURES, Plain, peft, trainer
from tests.helpers.rank_forks import run_ranks

LIMIT = 60.0


def batches(count: int) -> DataLoader[Any]:
    rows = [(torch.zeros(2, FEATURES), torch.arange(2) % CLASSES)] * count
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def stage(strategy: str, name: str, uneven: str, rank: int) -> None:
    importlib.import_module(current())  # before the callback: it registers the strategies there
    run = trainer(
        peft(),
        devices=2,
        strategy=strategy,
        max_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    own, same = batches(3 + rank), batches(3)
    module = Plain()
    if name == "fit":
        train, val = (own, same) if uneven == "train" else (same, own)
        run.fit(module, train, val)
    else:
        getattr(run, name)(module, own)
    print("ended", flush=True)


def main(strategy: str, name: str, uneven: str) -> None:
    torch.set_num_threads(1)
    statuses, _ = run_ranks(partial(stage, strategy, name, uneven), 2, LIMIT)
    print("statuses", statuses)
