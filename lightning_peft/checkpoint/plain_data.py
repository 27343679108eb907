"""Finds values that `torch.load(weights_only=True)` refuses."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["fields_not_plain"]


def fields_not_plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the fields that would be refused, with the type or the reason."""
    refused = []
    for field, value in values.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, TypeError) as error:
            refused.append((str(field), type(value).__name__ or str(error)))
    return refused
