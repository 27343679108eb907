"""States of the random generators as plain data: without them dropout differs after a resume."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["gather_rng_states", "restore_rng", "rng_state"]


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """States of torch, CUDA (this process's device), Python, and numpy where it is in use."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state(legacy=True)
        state["numpy"] = [str(kind), torch.from_numpy(keys.astype("int64")), *map(float, rest)]
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def gather_rng_states(device: torch.device | None = None) -> list[dict[str, Any]]:
    """Return the states of every rank, in order. Every rank must call it."""
    own = rng_state(device)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def restore_rng(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = state["numpy"]
        words_32 = keys.numpy().astype("uint32")
        sys.modules["numpy"].random.set_state(
            (kind, words_32, int(position), int(has_gauss), cached)
        )
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
