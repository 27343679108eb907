"""Peak bytes and time of a training step: plain, checkpointed, offloaded, with a chunked loss.

A Llama of 8 blocks with LoRA, one sample of 2048 tokens, a vocabulary of 32,000, float32. On the
CPU, host and device are one memory: the code for CUDA copies offloaded tensors to memory that torch
does not allocate, and the peak is that of torch's allocations, without weights. The time is the
processor's on one thread, copies included; it says nothing about a GPU.

    python benchmarks/cpu/step_memory.py [--smoke] [--repeats 3]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib.outside_memory import outside_memories
from benchmarks.lib.side_by_side import traced_peak, write
from lightning_peft import Activations, LoRA, attach, chunk_losses, estimate_memory
from lightning_peft.activations.limit import ActivationLimit

#: Name → (kind of activations, form of the loss).
OPTIONS: dict[str, tuple[Any, Any]] = {
    "plain": (None, None),
    "checkpoint": ("checkpoint", None),
    "offload": ("offload", None),
    "checkpoint+offload": ("checkpoint+offload", None),
    "chunked": (None, "chunked"),
    "checkpoint, chunked": ("checkpoint", "chunked"),
    "offload, chunked": ("offload", "chunked"),
    "checkpoint+offload, chunked": ("checkpoint+offload", "chunked"),
}
METHOD = LoRA(r=8, target_modules="all-linear")


def config(smoke: bool) -> LlamaConfig:
    size = 4 if smoke else 1
    return LlamaConfig(
        vocab_size=32_000 // size,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8 // size,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )


class Candidate:
    """One model with one choice of options."""

    def __init__(self, model: Any, ids: torch.Tensor, kind: Any, loss: Any) -> None:
        self.model, self.ids, self.kind, self.loss = copy.deepcopy(model), ids, kind, loss
        self.moved = 0
        self.value = 0.0

    def step(self) -> None:
        with ExitStack() as stack:
            limit = None
            if self.kind is not None:
                how = Activations(self.kind)
                limit = stack.enter_context(ActivationLimit(self.model, how, outside_memories()))
            if self.loss is not None:
                stack.enter_context(chunk_losses(self.model))
            self.model.zero_grad()
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            loss.backward()
            self.value = float(loss.detach())
            self.moved = 0 if limit is None else limit.moved

    def gradients(self) -> torch.Tensor:
        grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return torch.cat(grads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a smaller model")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    size, length = config(chosen.smoke), 256 if chosen.smoke else 2048
    model = LlamaForCausalLM(size).train()
    attach(model, METHOD)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    ids = torch.randint(0, size.vocab_size, (1, length))
    made = {name: Candidate(model, ids, *how) for name, how in OPTIONS.items()}
    peaks = {name: _peak(candidate) for name, candidate in made.items()}
    plain = made["plain"].gradients()
    distance = {
        name: float((c.gradients() - plain).norm() / plain.norm()) for name, c in made.items()
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(chosen.repeats):
        for name, candidate in made.items():
            start = time.process_time()  # other work on the machine does not count
            candidate.step()
            times[name].append(time.process_time() - start)
    rows = []
    for name, candidate in made.items():
        plan = estimate_memory(
            size,
            METHOD,
            precision="32-true",
            sequence_length=length,
            activations=candidate.kind,
            loss=candidate.loss,
        )
        planned = plan.peak - sum(plan.parts[p] for p in ("base weights", "adapters"))
        rows.append(
            {
                "options": name,
                "tokens": length,
                "vocabulary": size.vocab_size,
                "step_mb": round(peaks[name] / 1e6, 1),
                "planned_mb": round((planned - plan.parts["optimizer state"]) / 1e6, 1),
                "moved_mb": round(candidate.moved / 1e6, 1),
                "cpu_ms": round(1e3 * statistics.median(times[name])),
                "loss": f"{candidate.value:.6f}",
                "gradient_distance": f"{distance[name]:.1e}",
            }
        )
    if chosen.smoke:
        for row in rows:
            print(row)
        return
    write("step_memory", rows)


def _peak(candidate: Candidate) -> int:
    """Bytes of one step beyond the model's own tensors."""
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*candidate.model.parameters(), *candidate.model.buffers()]
    }
    return traced_peak(candidate.model, candidate.step, 1) - sum(held.values())


if __name__ == "__main__":
    main()
