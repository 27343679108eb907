"""Bytes of the units that FSDP2 has gathered, at the moments that may be the fullest."""

from __future__ import annotations

from typing import NamedTuple

from lightning_peft.planner.meta_model import Sizes

__all__ = ["Gathered"]


class Gathered(NamedTuple):
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

    @classmethod
    def of(cls, sizes: Sizes, ranks: int, *, reshards: bool, whole_head: bool) -> Gathered:
        """Count the units of a model.

        Args:
            sizes: Bytes of the units.
            ranks: Number of ranks that shard. A single one copies, and receives nothing.
            reshards: Whether units are freed between their forward and their backward.
            whole_head: Whether embedding and head are in the root's unit.
        """
        copies = 1 if ranks == 1 else 2
        arriving, sent = (0, 0) if ranks == 1 else (sizes.block, sizes.block_trained)
        kept = sizes.rest + sizes.tied
        embedding, head = sizes.embedding, sizes.head
        if whole_head:
            kept, embedding, head = kept + embedding + head, 0, 0
        if not reshards:
            everything = sizes.base_bytes + sizes.trained_bytes
            arrived = everything + arriving
            start = kept + copies * embedding
            return cls(start, arrived + (copies - 1) * head, arrived, everything + sent)
        return cls(
            start=kept + copies * embedding,
            head=kept + arriving + copies * head,
            forward=kept + max(head, sizes.block + arriving),
            backward=kept + max(head, sizes.block) + arriving + sent,
        )
