"""Bytes of the units that FSDP2 has gathered, at the moments that may be the fullest."""

from __future__ import annotations

from typing import NamedTuple

from lightning_peft.planner.choice import Choice
from lightning_peft.planner.sizes import Sizes

__all__ = ["GatheredUnits", "gathered_units"]


class GatheredUnits(NamedTuple):
    """Bytes of gathered units on one rank.

    A unit is received in one buffer and copied from it into parameters. The buffer of a block is
    freed when the next unit has arrived.

    Attributes:
        start: While the embedding arrives, before there are activations.
        head: While the head arrives, before there are logits.
        forward: While the last block or the head runs.
        backward: While the head or a block runs backward: the block before it arrives, and
            gradients are sent.
    """

    start: int
    head: int
    forward: int
    backward: int


def gathered_units(choice: Choice, sizes: Sizes) -> GatheredUnits:
    """Count the units of a model that several ranks share, or that one rank copies."""
    copies, arriving, sent = 2, sizes.block, sizes.block_trained
    if choice.shards == 1:
        copies, arriving, sent = 1, 0, 0  # nothing is received
    kept, embedding, head = sizes.rest + sizes.tied, sizes.embedding, sizes.head
    if choice.liger:  # its loss reads the head's weight, so both are in the root's unit
        kept, embedding, head = kept + embedding + head, 0, 0
    start = kept + copies * embedding
    if not choice.reshard_after_forward:
        everything = sizes.base_bytes + sizes.trained_bytes
        return GatheredUnits(
            start=start,
            head=everything + arriving + (copies - 1) * head,
            forward=everything + arriving,
            backward=everything + sent,
        )
    return GatheredUnits(
        start=start,
        head=kept + arriving + copies * head,
        forward=kept + max(head, sizes.block + arriving),
        backward=kept + max(head, sizes.block) + arriving + sent,
    )
