"""A training step of Llama-3-8B's shape through a real Trainer: QLoRA of rank 16, checkpointing on.

(a) Hugging Face peft + bitsandbytes in a plain LightningModule, (b) bf16 LoRA with peft, (c) ours,
(d) ours with FP8 compute, each also with liger-kernel where it installs. Random weights and tokens.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import lightning
import torch
from torch import nn

from benchmarks.lib import harness, llama
from benchmarks.lib.harness import NOT_MEASURED

BASE = "peft + bitsandbytes"
CANDIDATES = [BASE, "peft bf16", "ours", "ours fp8"]


class Module(lightning.LightningModule):
    """Loss of random tokens; notes time, loss and gradient norm of every step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[tuple[float, float, float]] = []
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        harness.synchronize()
        self.started = time.perf_counter()

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = [p.grad.float().norm() for p in self.parameters() if p.grad is not None]
        self.norm = torch.stack(norms).norm()

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        harness.synchronize()
        elapsed = time.perf_counter() - self.started
        self.seen.append((elapsed, outputs["loss"].item(), self.norm.item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, fused=self.device.type == "cuda")


def model_of(name: str, chosen: Any) -> nn.Module:
    r = 4 if chosen.smoke else 16
    model = llama.base(chosen.smoke, chosen.device)
    if "liger" in name:
        reason = llama.liger(model)
        if reason:
            raise ImportError(reason)
    if name.startswith(BASE):
        model = llama.hugging_face(model, r, quantized=True)
    elif name.startswith("peft"):
        model = llama.hugging_face(model, r, quantized=False)
    else:
        model = llama.ours(model, r, compute="fp8" if "fp8" in name else "auto")
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    inner.config.use_cache = False
    model.train()
    return model


def measure(name: str, chosen: Any, rows: int, length: int, steps: int) -> dict[str, Any]:
    module = Module(model_of(name, chosen))
    generator = torch.Generator().manual_seed(1)
    vocabulary = 64 if chosen.smoke else 128256
    tokens = torch.randint(vocabulary, (steps, rows, length), generator=generator)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="gpu" if chosen.device.type == "cuda" else "cpu", devices=1,
        precision="bf16-mixed" if name.startswith(BASE) else "bf16-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    if chosen.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=None))
    timed = [s[0] for s in module.seen[len(module.seen) // 3 :]]
    cuda = chosen.device.type == "cuda"
    return {
        "seconds": statistics.median(timed),
        "tokens_per_s": f"{rows * length / statistics.median(timed):.1f}",
        "peak_GiB": f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if cuda else NOT_MEASURED,
        "loss_first": f"{module.seen[0][1]:.5f}",
        "loss_last": f"{module.seen[-1][1]:.5f}",
        "grad_norm_first": f"{module.seen[0][2]:.5f}",
    }


COLUMNS = ("tokens_per_s", "peak_GiB", "loss_first", "loss_last", "grad_norm_first")


def main() -> None:
    chosen = harness.options(__doc__ or "", steps=9)
    batches, length = ([1], 16) if chosen.smoke else ([1, 4, 8], 2048)
    steps = 3 if chosen.smoke else chosen.steps
    rows = []
    for batch in batches:
        base_seconds = None
        for name in [*CANDIDATES, *(f"{c} + liger" for c in (BASE, "ours", "ours fp8"))]:
            row = {"candidate": name, "batch": batch, "length": length, "steps": steps}
            found: dict[str, Any] = dict.fromkeys((*COLUMNS, "ratio_to_peft"), NOT_MEASURED)
            note = ""
            if harness.runs(chosen):
                try:
                    got = measure(name, chosen, batch, length, steps)
                    base_seconds = got["seconds"] if name == BASE else base_seconds
                    found |= {k: got[k] for k in COLUMNS}
                    if base_seconds is not None:
                        found["ratio_to_peft"] = f"{base_seconds / got['seconds']:.3f}"
                except (ImportError, torch.cuda.OutOfMemoryError) as error:
                    note = str(error).splitlines()[0]
                gc.collect()
                if chosen.device.type == "cuda":
                    torch.cuda.empty_cache()
            rows.append(row | found | {"note": note})
    harness.write(chosen, "training", rows)


if __name__ == "__main__":
    main()
