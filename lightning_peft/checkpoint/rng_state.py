"""States of the random generators as plain data: without them dropout differs after a resume."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_rng_states", "malformed_generators", "restore_rng", "rng_state"]


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """States of torch, CUDA (this process's device), Python, and numpy where it is in use."""
    version, words, gauss = random.getstate()
    # One tensor: pickle asks torch about every single number of a tuple.
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(words), gauss],
    }
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
    numbers = words.tolist() if isinstance(words, Tensor) else words  # a tuple before format 4
    random.setstate((version, tuple(numbers), gauss))
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = state["numpy"]
        words_32 = keys.numpy().astype("uint32")
        sys.modules["numpy"].random.set_state(
            (kind, words_32, int(position), int(has_gauss), cached)
        )
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


# ---- states from a file


def malformed_generators(state: Mapping[str, Any]) -> list[str]:
    """Names of the generators whose stored state has another form than `rng_state` writes."""
    rules: dict[str, Callable[[Any], bool]] = {
        "torch": lambda v: _is_bytes(v) and v.numel() == torch.get_rng_state().numel(),
        "python": _is_python_state,
        "numpy": _is_numpy_state,
        "cuda": _is_bytes,
    }
    needed = ("torch", "python")
    return [
        n for n, holds in rules.items() if (n in state or n in needed) and not holds(state.get(n))
    ]


def _is_bytes(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1


def _is_python_state(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    version, words, gauss = value
    if isinstance(words, Tensor) and words.dtype == torch.int64 and words.ndim == 1:
        words = words.tolist()
    return (
        version == 3
        and isinstance(words, list | tuple)
        and len(words) == 625
        and all(type(n) is int and 0 <= n < 1 << 32 for n in words)
        and words[-1] <= 624
        and (gauss is None or type(gauss) is float)
    )


def _is_numpy_state(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 5
        and value[0] == "MT19937"
        and isinstance(value[1], Tensor)
        and value[1].shape == (624,)
        and value[1].dtype == torch.int64
        and type(value[2]) in (int, float)
        and 0 <= value[2] <= 624
        and type(value[3]) in (int, float)
        and value[3] in (0, 1)
        and type(value[4]) is float
        and math.isfinite(value[4])
    )
