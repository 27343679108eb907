"""A packed base trained in one process and in two under DDP; two under FSDP2 are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_peft import PEFT, LoRA, load_packed
from lightning_peft.storage import held_tensors
from tests.helpers.rank_forks import run_ranks


class Module(L.LightningModule):
    """Trains a causal language model on all of a global batch of four samples."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.net: Any = load_packed(AutoModelForCausalLM, folder, dtype=torch.float32).train()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def fit(folder: str, out: str, options: dict[str, Any], ranks: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    samples = torch.randint(0, 64, (12, 7), generator=generator)
    data: Any = DataLoader(samples[rank::ranks], batch_size=4 // ranks)  # type: ignore[arg-type]
    L.seed_everything(0, verbose=False)
    module = Module(folder)
    L.Trainer(
        max_epochs=1, accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        callbacks=[PEFT(LoRA(r=2, target_modules="all-linear"), report=False)], **options,
    ).fit(module, data)  # fmt: skip
    held = ((n, k) for n, m in module.named_modules() for k in held_tensors(m))
    packed = {f"{n}.{k}": module.get_parameter(f"{n}.{k}").detach() for n, k in held}
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    torch.save({"packed": packed, "trained": trained}, Path(out) / f"{ranks}-{rank}.pt")


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    for ranks, options in ((1, {}), (2, {"strategy": "peft_ddp"})):
        statuses, _ = run_ranks(partial(fit, folder, out, options, ranks), ranks)
        print("statuses", statuses, flush=True)
    statuses, _ = run_ranks(partial(fit, folder, out, {"strategy": "peft_fsdp"}, 2), 2)
    print("sharded", statuses, flush=True)
