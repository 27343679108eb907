"""Counts the collectives and the bytes of each step under `peft_fsdp` on two ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import PEFT, LoRA
from tests.helpers.lightning_package import InPackage, pl
from tests.helpers.nets import trainer
from tests.helpers.rank_forks import run_ranks

#: Operations of torch.distributed, and the position of what they send.
_SENDERS = {"allgather_into_tensor_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1}


class Collectives(TorchDispatchMode):
    """Counts calls, and bytes of their inputs, of c10d's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in _SENDERS:
            sent = args[_SENDERS[name]]
            self.calls[name] += 1
            self.sent[name] += sent.numel() * sent.element_size()
        return func(*args, **(kwargs or {}))


class Net(InPackage):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = LlamaForCausalLM(
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
