"""EMA and SWA support: rebuilds the averaged model after adapters are attached.

Lightning's averaging callbacks copy the module in `setup`, before adapters exist. The copy made
here shares the frozen base with the live model, so memory holds one base. It averages trained
tensors only: an average over packed 4-bit bytes would destroy them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_peft.trainers.packages import callbacks_of, is_instance_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["AdapterAveragedModel", "rebuild_averages"]


class AdapterAveragedModel(AveragedModel):
    """torch's AveragedModel over trained tensors."""

    def __init__(
        self, copied: nn.Module, device: torch.device | None, use_buffers: bool, **kwargs: Any
    ) -> None:
        super().__init__(nn.Identity(), device=device, use_buffers=use_buffers, **kwargs)
        self.module = copied

    @override
    def update_parameters(self, model: nn.Module) -> None:
        """Add a sample to the average; buffers of integers are copied."""
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
    """Return a module that holds only the trained parameters and floating buffers of another."""
    part = nn.Module()
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        part.register_parameter(str(i), p)
    for i, b in enumerate(b for b in model.buffers() if b.is_floating_point()):
        part.register_buffer(f"b{i}", b)
    return part


def rebuild_averages(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give every averaging callback a copy of the module with its adapters.

    Raises:
        RuntimeError: Lightning no longer keeps the copy where it did.
    """
    for callback in callbacks_of(trainer):
        state = vars(callback)
        if is_instance_of(callback, "WeightAveraging"):
            _require(callback, "_average_model", "_device", "_use_buffers", "_kwargs")
            state["_average_model"] = AdapterAveragedModel(
                _sharing_copy(module), state["_device"], state["_use_buffers"], **state["_kwargs"]
            )
        elif is_instance_of(callback, "StochasticWeightAveraging"):
            _require(callback, "_average_model")
            state["_average_model"] = _sharing_copy(module)


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
