"""Outputs that a projection group computed for layers that have not been called yet."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_peft.layers.projection_group import PendingOutputs

__all__ = ["HAND_OFF", "output_of_group"]


class _HandOff(threading.local):
    """Outputs that one call of a thread leaves for its next calls: those of at most one group."""

    pending: PendingOutputs | None = None


HAND_OFF = _HandOff()


def output_of_group(m: nn.Module, x: Tensor) -> Tensor | None:
    """Return a layer's output if its group computes it; None if the layer runs alone.

    An ungrouped layer also discards outputs left over from an interrupted forward.
    """
    state = vars(m).get("_peft")
    if state is None or state.projection_group is None:
        HAND_OFF.pending = None
        return None
    y: Tensor | None = state.projection_group.run(m, x)
    return y
