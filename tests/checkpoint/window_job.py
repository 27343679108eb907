"""Runs that are saved inside an accumulation window, and runs that resume there.

Prints "equal" if each resumed run ends as the uninterrupted one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import assert_same, trainer
from tests.helpers.rank_forks import run_ranks
from tests.helpers.streams import Stream

WINDOW, STEPS = 4, 3


class Net(InPackage):
    """Rebuilds noisy input; every rank has batches and random states of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.randn(self.global_rank)
        seen = (1 + self.global_rank) * batch + 0.1 * torch.randn_like(batch)
        return (self.net(seen) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class SaveAt(InPackage):
    """Saves a checkpoint after every batch."""

    lightning_base = "Callback"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{args[-1]}.ckpt")


def fit(folder: Path, strategy: str, batch: int | None, rank: int) -> None:
    """From the start, or from the checkpoint that was saved after a batch."""
    module = Net()
    pl.seed_everything(1, verbose=False)
    run = trainer(
        PEFT(LoRA(r=4, dropout=0.1, target_modules="all-linear"), report=False),
        *([SaveAt(folder)] if batch is None else []),
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=WINDOW,
        enable_checkpointing=False,
        **({"devices": 2, "strategy": strategy} if strategy else {}),
    )
    source = None if batch is None else folder / f"{batch}.ckpt"
    run.fit(module, Stream(WINDOW * STEPS), ckpt_path=source, weights_only=True)
    assert run.global_step == STEPS
    run.save_checkpoint(folder / f"end-{batch}.ckpt")


def main(place: str, strategy: str) -> None:
    folder, ranks = Path(place), 2 if strategy else 1
    torch.set_num_threads(1)
    for batch in (None, 4, 5, 6):  # none, one, two and three batches of the window are over
        statuses, _ = run_ranks(partial(fit, folder, strategy, batch), ranks)
        assert set(statuses) == {0}, (batch, statuses)
        got, want = (read(folder / f"end-{b}.ckpt") for b in (batch, None))
        assert_same(got, want)
    print("equal")


def read(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found
