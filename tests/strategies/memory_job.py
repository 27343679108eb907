"""Memory of a step under `peft_fsdp` on two ranks, by options, beside the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_peft_kernels.nf4 import weight_buffers
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib.side_by_side import fullest_moment
from lightning_peft import LoRA, attach, chunk_losses, estimate_memory
from lightning_peft.strategies.sharding import Options, shard_model
from tests.helpers.rank_forks import run_ranks

RANKS, TOKENS = 2, 64
METHOD = LoRA(r=4, target_modules="all-linear")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reshard_after_forward=False": {"reshard_after_forward": False},
    "cpu_offload": {"cpu_offload": True},
    "chunked": {"loss": "chunked"},
    "tied": {},
}


def config(name: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=name == "tied",
        architectures=["LlamaForCausalLM"],
    )


@contextmanager
def loss_of(model: torch.nn.Module, kind: str | None) -> Iterator[None]:
    if kind is None:
        yield
    else:
        with chunk_losses(model):
            yield


def step_bytes(name: str) -> int:
    """Bytes of tensors at the fullest moment of two steps."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config(name)).train()
    attach(model, METHOD, quantization="nf4")
    weight_buffers.release()
    given = dict(OPTIONS[name])
    kind = given.pop("loss", None)
    mesh = init_device_mesh("cpu", (RANKS,))
    shard_model(model, mesh, torch.device("cpu"), Options(**given))
    held = sum(p.to_local().nbytes for p in model.parameters())
    held += sum(b.nbytes for b in model.buffers())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 4096, (1, TOKENS))
    how: Any = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with loss_of(model, kind), profile(**how) as traced:
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    return held + fullest_moment(traced)


def measure(out: str, names: list[str], rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = {name: step_bytes(name) for name in names}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def main(out: str, names: list[str]) -> None:
    statuses, _ = run_ranks(partial(measure, out, names), RANKS)
    assert statuses == [0] * RANKS, statuses


def planned(name: str) -> int:
    plan = estimate_memory(
        config(name),
        METHOD,
        quantization="nf4",
        precision="32-true",
        sequence_length=TOKENS,
        strategy="fsdp",
        world_size=RANKS,
        **OPTIONS[name],
    )
    return plan.peak + plan.host  # one memory on the CPU
