"""Bytes of a rank that do not depend on the batch: weights, state, buffers."""

from __future__ import annotations

import math

from lightning_peft.planner.choice import OPTIMIZER_BYTES, Choice
from lightning_peft.planner.sizes import Sizes
from lightning_peft.planner.storage_meter import GRADIENTS

__all__ = ["BUCKETS", "STATES", "WEIGHTS", "fixed_parts"]

#: Buffers of DDP, or units that FSDP has gathered, which change within a step.
BUCKETS = "communication buckets"
WEIGHTS = ("base weights", "adapters", "fully trained weights")
#: Parts that are divided among the ranks that share one copy.
STATES = (*WEIGHTS, GRADIENTS, "optimizer state")


def fixed_parts(choice: Choice, sizes: Sizes) -> dict[str, int]:
    """Return the bytes by part."""
    parts = {part: -(-n // choice.shards) for part, n in _states(choice, sizes).items()}
    if choice.cpu_offload:
        parts = dict.fromkeys(parts, 0)
    return {
        **parts,
        "dequantise buffers": sizes.dequantised * _compute_bytes(choice),
        BUCKETS: sizes.trained_bytes if choice.strategy == "ddp" and choice.world_size > 1 else 0,
        "gathered keys and values": _gathered_kv(choice, sizes),
    }


def _states(choice: Choice, sizes: Sizes) -> dict[str, int]:
    """Bytes of one copy of weights, gradients and optimizer state."""
    states, further = OPTIMIZER_BYTES[choice.optimizer]
    optimizer = states * sizes.trained_bytes + math.ceil(sizes.trainable * further)
    values = (sizes.base_bytes, sizes.adapters, sizes.full, sizes.trained_bytes, optimizer)
    return dict(zip(STATES, values, strict=True))


def _compute_bytes(choice: Choice) -> int:
    """Bytes of an element in the dtype that products run in."""
    return 4 if choice.precision == "32-true" else 2


def _gathered_kv(choice: Choice, sizes: Sizes) -> int:
    """Bytes of one layer's keys and values of all tokens, received in two steps."""
    if choice.context_parallel == 1:
        return 0
    tokens = choice.batch_size * choice.sequence_length
    return 2 * 2 * tokens * sizes.kv_width * _compute_bytes(choice)
