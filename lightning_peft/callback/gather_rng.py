"""The random states of all processes, for one file that one of them writes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_peft.checkpoint.rng_state import rng_state

__all__ = ["gather_rng"]


def gather_rng(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """One entry a rank. Every rank must call it, as every rank must call `save_checkpoint`."""
    own = rng_state(trainer.strategy.root_device)
    # While an exception is handled the others may be anywhere: no collective then.
    if trainer.world_size == 1 or trainer.state.status == TrainerStatus.INTERRUPTED:
        return [own]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, own)
    return states
