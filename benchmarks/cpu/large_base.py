"""Loads and trains a synthetic Llama-shaped base under `peft_fsdp` on gloo ranks of one machine.

    python benchmarks/cpu/large_base.py --layers 12 --hidden 3072 --vocab 32000 --ranks 1 2 4

That base has 3 GB.

The base is written to a folder of bf16 shards once. Per number of ranks a line of JSON shows the
largest rank's bytes held, peak growth of memory while loading and while training (anonymous memory,
mapped files left out), seconds, and bytes and calls of collectives per step.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode


def config(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 256),
        vocab_size=args.vocab,
    )


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


def anonymous() -> int:
    """Bytes of this process's own memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("expected RssAnon in /proc/self/status, found none; this needs Linux")


class Peak(threading.Thread):
    """Growth of anonymous memory by phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes, self.phase, self.over = anonymous(), "load", False
        self.growth: dict[str, int] = {}

    def run(self) -> None:
        while not self.over:
            grown = anonymous() - self.start_bytes
            self.growth[self.phase] = max(self.growth.get(self.phase, 0), grown)
            time.sleep(0.005)


class Collectives(TorchDispatchMode):
    """Calls of c10d's gathers and reductions, and bytes of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and isinstance(args[1], torch.Tensor) and "base" in name:
            entry = self.seen.setdefault(name.strip("_"), [0, 0])
            entry[0] += 1
            entry[1] += args[1].numel() * args[1].element_size()
        return func(*args, **(kwargs or {}))


def work(rank: int, port: int, ranks: int, folder: str, args: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"} if ranks > 1 else {}
    torch.set_num_threads(1)
    import lightning.pytorch as pl
    from transformers import LlamaForCausalLM

    from lightning_peft import PEFT, LoRA

    class Net(pl.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                with torch.device("meta"):
                    self.net = LlamaForCausalLM(config(args)).to(torch.bfloat16)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.net(input_ids=batch, labels=batch, use_cache=False).loss

        def on_train_start(self) -> None:
            self.loaded = time.perf_counter() - begun
            peak.phase = "train"

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.sent = Collectives()
            self.sent.__enter__()

        def on_train_batch_end(self, *given: Any) -> None:
            self.sent.__exit__(None, None, None)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    module, peak = Net(), Peak()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="peft_fsdp",
        precision="bf16-true",
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            PEFT(
                LoRA(r=16, target_modules="all-linear"),
                quantization="nf4",
                base_from=folder,
                packed_cache=args.cache,
                report=False,
            )
        ],
    )
    ids: Any = torch.randint(0, args.vocab, (64, args.tokens))
    begun = time.perf_counter()
    peak.start()
    trainer.fit(module, torch.utils.data.DataLoader(ids, 1))
    peak.over = True
    held = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in module.parameters())
    found = {
        "ranks": ranks,
        "held_mb": held / 1e6,
        **{f"peak_{phase}_mb": grown / 1e6 for phase, grown in peak.growth.items()},
        "load_s": module.loaded,
        "total_s": time.perf_counter() - begun,
        "collectives": module.sent.seen,
    }
    Path(folder, f"result-{rank}.json").write_text(json.dumps(found))


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 4), ("hidden", 512), ("vocab", 8192), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cache", default=None)
    args = parser.parse_args(given)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        size = write_base(folder, args)
        for ranks in args.ranks:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            mp.spawn(work, (port, ranks, str(folder), args), nprocs=ranks)
            parts = [json.loads((folder / f"result-{r}.json").read_text()) for r in range(ranks)]
            row = max(parts, key=lambda part: part["peak_load_mb"]) | {"base_mb": size / 1e6}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
