"""Memory of a step under `peft_fsdp` on two or four ranks, by options, beside the plan."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_peft_kernels.nf4 import weight_buffers
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib.outside_memory import outside_memories
from benchmarks.lib.side_by_side import fullest_moment
from lightning_peft import Activations, LoRA, attach, chunk_losses, estimate_memory
from lightning_peft.activations.limit import ActivationLimit
from lightning_peft.strategies.meshes import data_mesh, split_sequences
from lightning_peft.strategies.sharding import Options, shard_model
from tests.helpers.rank_forks import run_ranks

TOKENS = 64
METHOD = LoRA(r=4, target_modules="all-linear")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reshard_after_forward=False": {"reshard_after_forward": False},
    "cpu_offload": {"cpu_offload": True},
    "chunked": {"loss": "chunked"},
    "tied": {},
    "checkpoint": {"activations": Activations("checkpoint")},
    "offload": {"activations": Activations("offload", min_bytes=0)},
    "replicas=2": {"replicas": 2},
    "context_parallel=2": {"context_parallel": 2},
}


def ranks(name: str) -> int:
    return 4 if name == "replicas=2" else 2


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


def step_bytes(name: str) -> int:
    """Bytes of tensors at the fullest moment of two steps."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config(name)).train()
    attach(model, METHOD, quantization="nf4")
    weight_buffers.release()
    given = dict(OPTIONS[name])
    kind, activations = given.pop("loss", None), given.pop("activations", None)
    options = Options(**given)
    mesh = init_device_mesh("cpu", (ranks(name),))
    shard_model(model, data_mesh(mesh, options.replicas), torch.device("cpu"), options)
    split_sequences(model, mesh, options.context_parallel)
    held = sum(p.to_local().nbytes for p in model.parameters())
    held += sum(b.nbytes for b in model.buffers())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 4096, (1, TOKENS))
    how: Any = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with ExitStack() as stack:
        if activations is not None:
            limit = ActivationLimit(model, activations, outside_memories())
            stack.enter_context(limit)
        if kind is not None:
            stack.enter_context(chunk_losses(model))
        traced = stack.enter_context(profile(**how))
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    return held + fullest_moment(traced)


def measure(out: str, name: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks(name))
    found = step_bytes(name)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def main(out: str, name: str) -> None:
    statuses, _ = run_ranks(partial(measure, out, name), ranks(name), 240.0)
    assert statuses == [0] * ranks(name), statuses


def planned(name: str) -> int:
    plan = estimate_memory(
        config(name),
        METHOD,
        quantization="nf4",
        precision="32-true",
        sequence_length=TOKENS,
        strategy="fsdp",
        world_size=ranks(name),
        **OPTIONS[name],
    )
    # Host and device are one memory on the CPU; activations go where torch does not count.
    return plan.peak + (plan.host if "cpu_offload" in OPTIONS[name] else 0)
