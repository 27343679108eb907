"""Bytes of a rank that do not depend on the batch: weights, state, and buffers of the strategy."""

from __future__ import annotations

import math

from lightning_peft.planner.choice import OPTIMIZER_BYTES, Choice
from lightning_peft.planner.meta_model import Sizes
from lightning_peft.planner.storage_meter import GRADIENTS

__all__ = ["STATES", "WEIGHTS", "fixed_parts"]

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
        "communication buckets": _buckets(choice, sizes),
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


def _buckets(choice: Choice, sizes: Sizes) -> int:
    if choice.world_size > 1 and choice.strategy == "ddp":
        return sizes.trained_bytes
    if choice.world_size > 1 and choice.strategy == "fsdp":
        return _gathered_units(choice, sizes)
    return 0


def _gathered_units(choice: Choice, sizes: Sizes) -> int:
    """Bytes of the units that FSDP has gathered at once, and of gradients on their way."""
    if not choice.reshard_after_forward:
        return sizes.base_bytes + sizes.trained_bytes + sizes.block + sizes.block_trained
    end, rest = sizes.end, sizes.rest
    if choice.liger:  # it reads the head's weight
        end, rest = 0, rest + end
    # This unit and the next, of which one may be the embedding or the head.
    return sizes.block + max(sizes.block, end) + rest + sizes.block_trained


def _gathered_kv(choice: Choice, sizes: Sizes) -> int:
    """Bytes of one layer's keys and values of all tokens, received in two steps."""
    if choice.context_parallel == 1:
        return 0
    tokens = choice.batch_size * choice.sequence_length
    return 2 * 2 * tokens * sizes.kv_width * _compute_bytes(choice)
