"""Trains a task's model on its source data once, and keeps the weights between runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare.tasks.base import warmed

__all__ = ["pretrained"]


def pretrained(
    model: nn.Module,
    path: Path,
    batches: Callable[[], Iterator[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    lr: float,
) -> nn.Module:
    """Return the model with the weights of `path`, which are trained and written if missing."""
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        schedule = warmed(optimizer, steps)["lr_scheduler"]["scheduler"]
        model.train()
        for step, batch in enumerate(islice(batches(), steps)):
            value = loss(model, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            if step % 300 == 0:
                print(f"{path.stem}: step {step}, loss {float(value.detach()):.3f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model
