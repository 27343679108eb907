"""Gathers the random states of all ranks for the checkpoint that rank 0 writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.checkpoint.rng_state import gather_rng_states, rng_state
from lightning_peft.trainers.packages import is_interrupted

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["gather_rng"]


def gather_rng(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return one state per rank. Every rank must call it, as it must call `save_checkpoint`."""
    device = trainer.strategy.root_device
    # While an exception is handled, other ranks may be anywhere, so no collective can run.
    if trainer.world_size == 1 or is_interrupted(trainer):
        return [rng_state(device)]
    return gather_rng_states(device)
