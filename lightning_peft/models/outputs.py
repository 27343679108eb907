"""Outputs of a model on one batch of a data loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.models.modules import evaluating

__all__ = ["output_of", "relative_change", "run_on"]


def run_on(model: nn.Module, batch: object) -> Any:
    """The model's output: a mapping goes in by keyword, a tuple or list by position."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def relative_change(new: Tensor, old: Tensor) -> float:
    """‖new − old‖ / ‖old‖."""
    return float((new - old).norm() / old.norm().clamp_min(1e-30))


def output_of(model: nn.Module, batch: object) -> Tensor:
    """The model's main output in eval mode, without gradients, fp32."""
    with evaluating(model), torch.no_grad():
        return main_output(model, batch)


def main_output(model: nn.Module, batch: object) -> Tensor:
    """Run the model on a batch: its logits, last hidden states, or the first of a tuple, fp32."""
    out = run_on(model, batch)
    for attribute in ("logits", "last_hidden_state"):
        if getattr(out, attribute, None) is not None:
            out = getattr(out, attribute)
            break
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor.float()
