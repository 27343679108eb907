"""Fingerprint of the base: names, shapes, dtypes and a sampled hash of the content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import base_parameters
from lightning_peft.core.names import strip_compile

__all__ = [
    "fingerprint",
    "fingerprint_differences",
    "hash_of_samples",
    "sample_positions",
    "sampled_hash",
]

_SAMPLES = 64  # elements per tensor: 290 tensors of a 7 B model are sampled in a few milliseconds


def fingerprint(model: nn.Module, trained: Collection[str] = ()) -> dict[str, Any]:
    """Plain data that identifies the base's weights.

    Args:
        model: The model, before it is quantised.
        trained: Names of parameters that are trained as a copy (a fresh head). Their values do
            not count.

    Returns:
        ``{"tensors": {name: [shape, dtype, hash of the samples]}}``; the hash is "" for meta
        tensors.
    """
    tensors: dict[str, list[Any]] = {}
    for name, parameter in base_parameters(model).items():
        content = "" if name in trained else sampled_hash(parameter.detach())
        plain = strip_compile(name)
        tensors[plain] = [list(parameter.shape), str(parameter.dtype), content]
    return {"tensors": tensors}


def sampled_hash(t: Tensor) -> str:
    """Return a hash of elements at even distances; "" for a tensor without content."""
    if t.device.type == "meta" or t.numel() == 0:
        return ""
    if t.is_contiguous():
        step = max(1, t.numel() // _SAMPLES)
        chosen = t.reshape(-1)[::step][:_SAMPLES]
    else:  # an expanded tensor would take the memory of all its elements
        places = sample_positions(t.numel()).to(t.device)
        chosen = t[torch.unravel_index(places, t.shape)]
    return hash_of_samples(chosen)


def sample_positions(numel: int) -> Tensor:
    """Return the flat indices of the sampled elements of a tensor, at even distances."""
    return torch.arange(0, numel, max(1, numel // _SAMPLES))[:_SAMPLES]


def hash_of_samples(samples: Tensor) -> str:
    """Return the hash of sampled values, which depends on their dtype."""
    held = samples.cpu().contiguous()
    return hashlib.sha256(held.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def fingerprint_differences(stored: dict[str, Any], live: dict[str, Any]) -> list[str]:
    """Return one line per tensor that differs: name, expected, found.

    A dtype or a sampled hash is compared only where shapes agree; meta tensors compare by shape
    alone.
    """
    lines = []
    want, have = stored["tensors"], live["tensors"]
    for name in sorted(set(want) | set(have)):
        if name not in have:
            lines.append(f"{name}: in the checkpoint's base, not in this model")
        elif name not in want:
            lines.append(f"{name}: in this model, not in the checkpoint's base")
        elif want[name][0] != have[name][0]:
            lines.append(f"{name}: expected shape {want[name][0]}, got {have[name][0]}")
        elif want[name][1] != have[name][1]:
            lines.append(f"{name}: expected dtype {want[name][1]}, got {have[name][1]}")
        elif want[name][2] and have[name][2] and want[name][2] != have[name][2]:
            lines.append(f"{name}: same shape, other values")
    return lines
