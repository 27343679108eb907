"""A model run on one batch as a data loader gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["run_on"]


def run_on(model: nn.Module, batch: Any) -> Any:
    """The model's output: a mapping goes in by keyword, a tuple or list by position."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)
