"""The tensors of a checkpoint as a test compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.marker import unmarked

__all__ = ["stored_tensors"]


def stored_tensors(source: str | Path | dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a file, or of one that was read, without the marker."""
    read = source if isinstance(source, dict) else torch.load(source, weights_only=True)
    return unmarked(read["state_dict"])
