"""One optimizer step over the 448 adapter tensors of Llama-3-8B (rank 16, all linear layers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.lib import harness
from lightning_peft.optim import convert_optimizer

# (in, out) of the seven linear layers of a block.
LAYERS = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336)]
LAYERS.append((14336, 4096))
BASE = "bitsandbytes PagedAdamW8bit"


def parameters(chosen: Any) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    shapes = [s for K, N in LAYERS for s in ((16, K), (N, 16))] * 32
    if chosen.smoke:
        shapes = [(4, 96), (64, 4), (4, 8)]
    made = [torch.nn.Parameter(torch.randn(s, device=chosen.device)) for s in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def optimizers(chosen: Any) -> dict[str, torch.optim.Optimizer | None]:
    made: dict[str, torch.optim.Optimizer | None] = {}
    for name in ("adamw_8bit", "lion_8bit"):
        own = torch.optim.AdamW(parameters(chosen), lr=1e-4)
        convert_optimizer(own, name)
        made[f"ours {name}"] = own
    made["torch AdamW fused"] = torch.optim.AdamW(parameters(chosen), lr=1e-4, fused=True)
    made["torch AdamW foreach"] = torch.optim.AdamW(parameters(chosen), lr=1e-4, foreach=True)
    made[BASE] = made["bitsandbytes AdamW8bit"] = None
    try:
        import bitsandbytes
    except ImportError:
        return made
    made["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit(parameters(chosen), lr=1e-4)
    if chosen.device.type == "cuda":  # paged state is CUDA's managed memory
        made[BASE] = bitsandbytes.optim.PagedAdamW8bit(parameters(chosen), lr=1e-4)
    return made


def main() -> None:
    chosen = harness.options(__doc__ or "")
    made = optimizers(chosen) if harness.runs(chosen) else {}
    steps: dict[str, Callable[[], Any]] = {k: o.step for k, o in made.items() if o is not None}
    times = harness.interleaved(steps, repeats=3 if chosen.smoke else 30, warmup=3)
    tensors = parameters(chosen) if harness.runs(chosen) else []
    rows = [
        {"optimizer": name, "tensors": len(tensors), "elements": sum(p.numel() for p in tensors)}
        | harness.spread(times.get(name))
        | {"ratio_to_paged_adamw8bit": harness.ratio(times.get(BASE), times.get(name))}
        for name in made or ["all"]
    ]
    harness.write(chosen, "optimizer", rows)


if __name__ == "__main__":
    main()
