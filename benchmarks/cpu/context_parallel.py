"""Bytes per rank of a training step when 1, 2 and 4 gloo ranks share one sequence.

A small Llama with LoRA on NF4 under FSDP2, one sequence, float32, on one machine. Bytes are those
of tensors at the fullest moment of two steps, gloo's own buffers left out; the plan is that of
`estimate_memory`. Losses are those of the second step.

    python benchmarks/cpu/context_parallel.py [--tokens 2048] [--csv]
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from benchmarks.lib.side_by_side import fullest_moment, write


def config(tokens: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        architectures=["LlamaForCausalLM"],
    )


def method() -> Any:
    from lightning_peft import LoRA

    return LoRA(r=8, target_modules="all-linear")


def work(rank: int, ranks: int, port: int, tokens: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import LlamaForCausalLM

    from lightning_peft import attach
    from lightning_peft.strategies.meshes import split_sequences
    from lightning_peft.strategies.sharding import Options, shard_model

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config(tokens)).train()
    attach(model, method(), quantization="nf4")
    mesh = init_device_mesh("cpu", (ranks,))
    shard_model(model, mesh, torch.device("cpu"), Options(context_parallel=ranks))
    split_sequences(model, mesh, ranks)
    held = sum(p.to_local().nbytes for p in model.parameters())
    held += sum(b.nbytes for b in model.buffers())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(0, 4096, (1, tokens))
    losses = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    found = {"loss": losses[-1], "step": held + fullest_moment(traced)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def row(ranks: int, tokens: int) -> dict[str, Any]:
    from lightning_peft import estimate_memory

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, port, tokens, folder), nprocs=ranks)
        parts = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(ranks)]
    plan = estimate_memory(
        config(tokens),
        method(),
        quantization="nf4",
        precision="32-true",
        optimizer="sgd",
        sequence_length=tokens,
        strategy="fsdp",
        world_size=ranks,
        context_parallel=ranks,
    )
    steps = [part["step"] for part in parts]
    return {
        "ranks": ranks,
        "tokens": tokens,
        "first_rank_mb": round(steps[0] / 1e6, 1),
        "last_rank_mb": round(steps[-1] / 1e6, 1),
        "planned_mb": round(plan.peak / 1e6, 1),
        "loss": f"{parts[0]['loss']:.6f}",
        "loss_differs_by": f"{max(abs(p['loss'] - parts[0]['loss']) for p in parts):.0e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--csv", action="store_true", help="into results/context_parallel.csv")
    args = parser.parse_args()
    rows = []
    for ranks in args.ranks:
        rows.append(row(ranks, args.tokens))
        print(json.dumps(rows[-1]), flush=True)
    if args.csv:
        write("context_parallel", rows)


if __name__ == "__main__":
    main()
