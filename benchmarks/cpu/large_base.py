"""Loads and trains a synthetic Llama-shaped base under `peft_fsdp` on gloo ranks of one machine.

    python benchmarks/cpu/large_base.py --layers 12 --hidden 3072 --vocab 32000 --ranks 1 2 4

That base has 2.8 GB. It is written to a folder of bf16 shards once. Every row is the rank that
needs most:

* bytes read from the files, and their sum over ranks;
* bytes held after loading, and growth of the process while loading (anonymous memory, without
  mapped files), beside the ideal: bytes held and two dense layers;
* bytes of tensors at the fullest moment of two steps, beside the plan of `estimate_memory`. On the
  CPU, host and device are one memory, so the plan includes what it puts into host memory;
* calls of collectives, and bytes that a rank sends in them per step, beside the ideal: blocks are
  gathered twice, embedding and head once, and gradients of trained tensors are reduced once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from benchmarks.lib.rank_meters import Collectives, CountedRows, Peak, count_reads
from benchmarks.lib.side_by_side import fullest_moment, write

#: What FSDP2 calls.
GATHER, REDUCE = "_allgather_base_", "_reduce_scatter_base_"


@dataclass(frozen=True)
class Options:
    """Arguments of the strategy, of the callback and of the planner that belong together."""

    strategy: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    @property
    def plan(self) -> dict[str, Any]:
        return {**self.strategy, **self.callback}


OPTIONS = {
    "plain": Options(),
    "reshard_after_forward=False": Options({"reshard_after_forward": False}),
    "replicas=2": Options({"replicas": 2}),
    "cpu_offload": Options({"cpu_offload": True}),
    "chunked": Options({}, {"loss": "chunked"}),
    "checkpoint, chunked": Options({}, {"loss": "chunked", "activations": "checkpoint"}),
    "checkpoint+offload": Options({}, {"activations": "checkpoint+offload"}),
}


def config(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 256),
        vocab_size=args.vocab,
        architectures=["LlamaForCausalLM"],
    )


def method() -> Any:
    from lightning_peft import LoRA

    return LoRA(r=16, target_modules="all-linear")


def write_base(folder: Path, args: argparse.Namespace, files: int = 4) -> int:
    """Write seeded bf16 weights; return their bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        state = LlamaForCausalLM(config(args)).state_dict()
    folder.mkdir(parents=True)
    generator, names, where = torch.Generator().manual_seed(0), list(state), {}
    for i in range(files):
        part = {}
        for name in names[i::files]:
            shape = state[name].shape
            drawn = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
            part[name] = torch.ones_like(drawn) if "norm" in name else drawn * 0.02
            where[name] = f"model-{i:05d}.safetensors"
        save_file(part, folder / f"model-{i:05d}.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(t.numel() * 2 for t in state.values())


# ---- what a rank measures


def own_bytes(tensors: Any) -> int:
    """Bytes of this rank's shards."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in tensors)


def sent_at_best(net: Any, ranks: int, options: Options) -> dict[str, int]:
    """Bytes that a rank must send per step in gathers and in reductions."""
    if ranks == 1:
        return {}
    everything = own_bytes(net.parameters())
    ends = [net.get_input_embeddings(), net.get_output_embeddings()]
    once = own_bytes(p for end in ends for p in end.parameters())
    twice = everything - once if options.strategy.get("reshard_after_forward", True) else 0
    trained = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    return {GATHER: everything + twice, REDUCE: trained}


def work(
    rank: int, port: int, ranks: int, folder: str, args: argparse.Namespace, name: str
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"} if ranks > 1 else {}
    torch.set_num_threads(1)
    import lightning.pytorch as pl
    from torch.distributed import fsdp  # noqa: F401  its modules do not belong to loading
    from transformers import LlamaForCausalLM

    from lightning_peft import PEFT
    from lightning_peft.strategies.lightning import PEFTFSDPStrategy

    class Net(pl.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                with torch.device("meta"):
                    self.net = LlamaForCausalLM(config(args)).to(torch.bfloat16)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.net(input_ids=batch, labels=batch, use_cache=False).loss

        def on_train_start(self) -> None:
            self.loaded, peak.over = time.perf_counter() - begun, True
            self.held = own_bytes(self.parameters())
            self.held += sum(b.nbytes for b in self.buffers())
            traced.start()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.sent = Collectives()
            self.sent.__enter__()

        def on_train_batch_end(self, *given: Any) -> None:
            self.sent.__exit__(None, None, None)

        def on_train_end(self) -> None:
            traced.stop()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    options = OPTIONS[name]
    count_reads()
    traced = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    module, peak = Net(), Peak()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=PEFTFSDPStrategy(**options.strategy),
        precision="bf16-true",
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            PEFT(
                method(),
                quantization="nf4",
                base_from=folder,
                packed_cache=args.cache,
                report=False,
                **options.callback,
            )
        ],
    )
    ids: Any = torch.randint(0, args.vocab, (64, args.tokens))
    begun = time.perf_counter()
    peak.start()
    trainer.fit(module, torch.utils.data.DataLoader(ids, 1))
    found = {
        "read": CountedRows.read,
        "held": module.held,
        "growth": peak.growth,
        "step": module.held + fullest_moment(traced),
        "load_s": module.loaded,
        "total_s": time.perf_counter() - begun,
        "sent": {k: (n, module.sent.sent[k]) for k, n in module.sent.calls.items()},
        "ideal": sent_at_best(module.net, ranks, options),
    }
    Path(folder, f"result-{rank}.json").write_text(json.dumps(found))


# ---- a row


def measured(args: argparse.Namespace, folder: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank measured."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, ranks, str(folder), args, name), nprocs=ranks)
    return [json.loads((folder / f"result-{r}.json").read_text()) for r in range(ranks)]


def layer_bytes(args: argparse.Namespace) -> int:
    """Bytes of one dense block."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        block = LlamaForCausalLM(config(args)).model.layers[0]
    return sum(p.numel() * 2 for p in block.parameters())


def row(args: argparse.Namespace, folder: Path, size: int, name: str, ranks: int) -> dict[str, Any]:
    from lightning_peft import estimate_memory

    parts = measured(args, folder, name, ranks)
    plan = estimate_memory(
        config(args),
        method(),
        quantization="nf4",
        precision="bf16-true",
        sequence_length=args.tokens,
        strategy="fsdp",
        world_size=ranks,
        **OPTIONS[name].plan,
    )
    planned, first = plan.peak + plan.host, parts[0]
    most = {key: max(part[key] for part in parts) for key in ("read", "held", "growth", "step")}
    gathers, reductions = (
        [*first["sent"].get(key, (0, 0)), first["ideal"].get(key, 0)] for key in (GATHER, REDUCE)
    )
    return {
        "options": name,
        "ranks": ranks,
        "base_mb": _mb(size),
        "read_mb": _mb(most["read"]),
        "read_by_all": round(sum(part["read"] for part in parts) / size, 3),
        "held_mb": _mb(most["held"]),
        "load_mb": _mb(most["growth"]),
        "load_ideal_mb": _mb(most["held"] + 2 * layer_bytes(args)),
        "step_mb": _mb(most["step"]),
        "planned_mb": _mb(planned),
        "planned_by_measured": round(planned / most["step"], 3),
        "gathers": gathers[0],
        "gathered_mb": _mb(gathers[1]),
        "gathered_ideal_mb": _mb(gathers[2]),
        "reductions": reductions[0],
        "reduced_mb": _mb(reductions[1]),
        "reduced_ideal_mb": _mb(reductions[2]),
        "load_s": round(max(part["load_s"] for part in parts), 1),
        "total_s": round(max(part["total_s"] for part in parts), 1),
    }


def _mb(size: int) -> float:
    return round(size / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 4), ("hidden", 512), ("vocab", 8192), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=["plain"])
    parser.add_argument("--cache", default=None)
    parser.add_argument("--csv", action="store_true", help="into results/large_base.csv")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        size = write_base(folder, args)
        for name in args.options:
            # One rank has nothing to share; options are compared on the largest number of ranks.
            for ranks in args.ranks if name == "plain" else args.ranks[-1:]:
                rows.append(row(args, folder, size, name, ranks))
                print(json.dumps(rows[-1]), flush=True)
    if args.csv:
        write("large_base", rows)


if __name__ == "__main__":
    main()
