"""Collective checks: an error on one process becomes an error on every process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_peft.core.names import counted

__all__ = [
    "average_on_all_ranks",
    "check_same_on_all_ranks",
    "gather_from_all_ranks",
    "raise_on_all_ranks",
]


def gather_from_all_ranks(own: object) -> list[Any]:
    """Return the value of every rank, in rank order. Without a process group there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, own)
    return answers


def average_on_all_ranks(t: Tensor) -> None:
    """Replace a tensor by its mean over processes, in place; a single process changes nothing."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(t)
        t /= dist.get_world_size()


def raise_on_all_ranks(error: Exception | None, what: str) -> None:
    """Raise on every process where one had an error: its own there, a copy of the text elsewhere.

    Raises:
        RuntimeError: another process failed, with its rank and message.
    """
    answers = gather_from_all_ranks(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(answers):
        if text is not None:
            raise RuntimeError(f"{what}: expected no error on any process, rank {rank} got {text}")


def _hash_of(data: Mapping[str, Any]) -> str:
    text = "\n".join(f"{key}: {data[key]!r}" for key in sorted(data))
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_on_all_ranks(own: Mapping[str, Any], what: str, advice: str) -> None:
    """Compare plain data between all processes.

    Hashes are sent first, and the data only if they differ.

    Raises:
        RuntimeError: on every process, with the first entries that differ and who has what.
    """
    if len(set(gather_from_all_ranks(_hash_of(own)))) == 1:
        return
    answers = gather_from_all_ranks(dict(own))
    first, lines = answers[0], []
    for rank, other in enumerate(answers[1:], 1):
        for key in sorted(set(first) | set(other)):
            here, there = first.get(key, "nothing"), other.get(key, "nothing")
            if here != there:
                lines.append(f"{key}: {here} on rank 0, {there} on rank {rank}")
    if lines:
        more = f"\n  … and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise RuntimeError(
            f"{what}: expected the same on all {len(answers)} processes, got "
            f"{counted(len(lines), 'difference')}; {advice}\n  " + "\n  ".join(lines[:8]) + more
        )
