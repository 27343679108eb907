"""A key in files of adapters that says who reads them.

Whoever loads such a file as a full model gets torch's list of unexpected keys. The marker is the
first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["MARKER", "marked", "unmarked"]

#: No module has a child of this name, so every strict load reports it.
MARKER = "adapters only: read by lightning_peft.load_from_checkpoint or load_checkpoint"

T = TypeVar("T")


def marked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a file with the marker, an empty tensor, in front."""
    return {MARKER: torch.empty(0), **state}


def unmarked(state: Mapping[str, T]) -> dict[str, T]:
    """Return the state dict of a file without the marker; earlier files have none."""
    return {key: value for key, value in state.items() if key != MARKER}
