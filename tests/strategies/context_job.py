"""One fit over sequences that ranks share; prints the losses."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft import PEFT, LoRA, Quantization
from tests.helpers.distributed.jobs import whole
from tests.helpers.lightning_package import InPackage, current, pl
from tests.helpers.nets import trainer
from tests.helpers.rank_forks import run_ranks
from tests.helpers.tiny_models import BUILDERS, VOCAB

LENGTH = 16


class Net(InPackage):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = BUILDERS[name]()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        labels = batch.clone()
        labels[:, :3] = -100  # a prompt without a loss: parts have different numbers of tokens
        loss: Tensor = self.net(input_ids=batch, labels=labels).loss
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        # Adam would turn rounding of gradients near zero into whole steps.
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def fit(out: str, name: str, ranks: int, shared: int, length: int, rank: int) -> None:
    torch.set_num_threads(1)
    ours = importlib.import_module(f"lightning_peft.strategies.{current().partition('.')[0]}")
    strategy = ours.PEFTFSDPStrategy(context_parallel=shared) if ranks > 1 else "auto"
    module = Net(name)
    run = trainer(
        PEFT(
            LoRA(r=4, target_modules="all-linear"),
            quantization=Quantization("nf4", block_size=32),
            report=False,
        ),
        max_epochs=1,
        devices=ranks,
        strategy=strategy,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    ids = torch.randint(3, VOCAB, (12, length), generator=torch.Generator().manual_seed(3))
    groups = ranks // shared
    pl.seed_everything(1, verbose=False)
    own: Any = ids[rank // shared :: groups]
    run.fit(module, torch.utils.data.DataLoader(own, batch_size=4 // groups))
    trained = {n: whole(p) for n, p in module.named_parameters() if p.requires_grad}
    if rank == 0:
        torch.save(trained, f"{out}.pt")
    Path(f"{out}-{rank}.json").write_text(json.dumps(module.losses))


def main(out: str, name: str, ranks: int, shared: int, length: int = LENGTH) -> None:
    statuses, _ = run_ranks(partial(fit, out, name, ranks, shared, length), ranks)
    print("statuses", statuses, flush=True)
