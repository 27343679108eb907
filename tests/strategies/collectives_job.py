"""Counts the collectives and the bytes of each step under `peft_fsdp` on two ranks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib.rank_meters import Collectives
from lightning_peft import PEFT, LoRA, Quantization, attach, convert_optimizer
from lightning_peft.checkpoint.sharded import (
    gather_optimizers,
    optimizer_shard,
    shard_optimizer_state,
)
from lightning_peft.core.collectives import gather_from_all_ranks
from lightning_peft.strategies.sharding import Options, shard_model
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import trainer
from tests.helpers.rank_forks import run_ranks


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


class Net(InPackage):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = llama(tied)
        self.seen: list[dict[str, list[int]]] = []
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(float(loss))
        return loss

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.counted = Collectives()
        self.counted.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.counted.__exit__(None, None, None)
        calls, sent = self.counted.calls, self.counted.sent
        self.seen.append({name: [calls[name], sent[name]] for name in calls})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(out: str, tied: bool, accumulate: int, rank: int) -> None:
    torch.set_num_threads(1)
    module = Net(tied)
    pl.seed_everything(1, verbose=False)
    run = trainer(
        PEFT(LoRA(r=2, target_modules="all-linear", dropout=0.0), report=False),
        max_steps=2,
        accumulate_grad_batches=accumulate,
        devices=2,
        strategy="peft_fsdp",
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    ids = torch.randint(0, 512, (16, 8), generator=torch.Generator().manual_seed(rank))
    run.fit(module, torch.utils.data.DataLoader(ids, batch_size=2))
    if rank == 0:
        sizes = {
            "embedding": module.net.model.embed_tokens.weight.to_local().nbytes,
            "trained": sum(p.numel() * 4 for p in module.parameters() if p.requires_grad),
            "frozen": sum(p.to_local().nbytes for p in module.parameters() if not p.requires_grad),
        }
        found = {"steps": module.seen, "losses": module.losses, "sizes": sizes}
        Path(out).write_text(json.dumps(found))


def main(out: str, tied: bool, accumulate: int) -> None:
    statuses, _ = run_ranks(partial(fit, out, tied, accumulate), 2)
    assert statuses == [0, 0], statuses


def read(folder: str, out: str, packed: bool, rank: int) -> None:
    """Read a base into shards, then give out and put together the state of an optimizer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with torch.device("meta"):
        model = llama(False)
    quantization = Quantization("nf4", block_size=32) if packed else None
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization=quantization)
    mesh = init_device_mesh("cpu", (2,))
    with Collectives() as reading:
        shard_model(model, mesh, torch.device("cpu"), Options(base_from=folder))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    convert_optimizer(optimizer, "adamw_8bit")
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    with Collectives() as saving:
        own = optimizer_shard(optimizer)
    whole = gather_optimizers(gather_from_all_ranks(own))
    with Collectives() as loading:
        optimizer.load_state_dict(shard_optimizer_state(optimizer, whole))
    if rank == 0:
        found = {"reading": reading.sent, "saving": saving.sent, "loading": loading.sent}
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def main_of_reading(folder: str, out: str, packed: bool) -> None:
    statuses, _ = run_ranks(partial(read, folder, out, packed), 2)
    assert statuses == [0, 0], statuses
