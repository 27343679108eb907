"""A finetuning callback on two processes."""

from __future__ import annotations

import torch

from lightning_peft import PEFT
from tests.helpers.lightning_package import pl
from tests.helpers.nets import Plain, lora, trainer
from tests.helpers.rank_forks import run_ranks


def fit(rank: int) -> None:
    finetuning = pl.callbacks.BackboneFinetuning(1, verbose=False)
    run = trainer(PEFT(lora(), root="net"), finetuning, devices=2, strategy="peft_ddp")
    run.fit(Plain())


def main() -> None:
    torch.set_num_threads(1)
    print("statuses", run_ranks(fit, 2)[0])
