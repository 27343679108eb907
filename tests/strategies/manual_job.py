"""Manual optimisation with several optimizers on two processes; a false alarm is an error."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import PEFT
from tests.helpers.lightning_package import InPackage, current, pl
from tests.helpers.nets import lora, trainer
from tests.helpers.rank_forks import run_ranks
from tests.helpers.streams import Stream


class Pair(InPackage):
    """A generator and a critic that learn in turn."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.way = way
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.critic = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.generator(x)
        return self.critic(made).mean() + made.square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        batch = batch * (1 + self.global_rank)
        for i, optimizer in enumerate(self.optimizers()):
            if self.way == "in turn" and batch_idx % 2 != i:
                continue
            if self.way == "toggled":
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self(batch) * (1 - 2 * i))
            optimizer.step()
            if self.way == "toggled":
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.critic)
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts]


def fit(way: str, rank: int) -> None:
    package = importlib.import_module(f"lightning_peft.strategies.{current().partition('.')[0]}")
    module = Pair(way)
    pl.seed_everything(1, verbose=False)
    run = trainer(
        PEFT(lora(dropout=0.0), report=False),
        devices=2,
        # a toggled optimizer leaves the others without gradients, which DDP must be told
        strategy=package.PEFTDDPStrategy(
            **({"find_unused_parameters": True} if way == "toggled" else {})
        ),
        max_epochs=1,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*got no gradient")
        run.fit(module, Stream(8))
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    total = sum(float(p.double().abs().sum()) for p in trained.values())
    moved = all(bool(p.any()) for n, p in trained.items() if n.endswith(".B"))
    print(f"rank {rank}: {total!r} {moved} {run.global_step}", flush=True)


def main(way: str) -> None:
    torch.set_num_threads(1)
    statuses, seconds = run_ranks(partial(fit, way), 2)
    print("statuses", statuses, f"{seconds:.1f} s")
