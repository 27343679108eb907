"""EMA and SWA beside adapters: their copy of the model is made again once the adapters are there.

Lightning's averaging callbacks copy the module in `setup`, before anything is attached. The copy
made here shares the
frozen base with the live model (no second base in memory) and averages only what is trained: an
average over packed
4-bit bytes would destroy them.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["AdapterAveragedModel", "rebuild_averages"]


class AdapterAveragedModel(AveragedModel):
    """torch's AveragedModel over what is trained."""

    def __init__(self, copied: nn.Module, device: Any, use_buffers: bool, **kwargs: Any) -> None:
        super().__init__(nn.Identity(), device=device, use_buffers=use_buffers, **kwargs)
        self.module = copied

    def update_parameters(self, model: nn.Module) -> None:
        """One more sample of the average; buffers that are no numbers are taken as they are."""
        whole = self.module
        self.module = _trained_part(whole)
        try:
            super().update_parameters(_trained_part(model))
        finally:
            self.module = whole
        for average, current in zip(whole.buffers(), model.buffers(), strict=True):
            if not average.is_floating_point():
                average.copy_(current)


def _trained_part(model: nn.Module) -> nn.Module:
    """A module that holds the trained parameters and floating buffers of another, nothing else."""
    part = nn.Module()
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        part.register_parameter(str(i), p)
    for i, b in enumerate(b for b in model.buffers() if b.is_floating_point()):
        part.register_buffer(f"b{i}", b)
    return part


def rebuild_averages(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give every averaging callback a copy of the module as it is now.

    Raises:
        RuntimeError: Lightning no longer keeps the copy where it did.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            _require(callback, "_average_model", "_device", "_use_buffers", "_kwargs")
            callback._average_model = AdapterAveragedModel(
                _sharing_copy(module),
                callback._device,
                callback._use_buffers,
                **callback._kwargs,
            )
        elif isinstance(callback, StochasticWeightAveraging):
            _require(callback, "_average_model")
            callback._average_model = _sharing_copy(module)


def _require(callback: pl.Callback, *names: str) -> None:
    missing = [n for n in names if not hasattr(callback, n)]
    if missing:
        raise RuntimeError(
            f"PEFT: expected {type(callback).__name__} to have {missing}, found none; this version "
            "of lightning keeps its averaged model elsewhere: leave the callback out, or use a "
            "tested version"
        )


def _sharing_copy(module: pl.LightningModule) -> pl.LightningModule:
    """A deep copy that shares the frozen parameters and the packed buffers."""
    shared: list[Tensor] = [p for p in module.parameters() if not p.requires_grad]
    shared += [b for b in module.buffers() if b.dtype == torch.uint8]
    copied: pl.LightningModule = copy.deepcopy(module, {id(t): t for t in shared})
    return copied
