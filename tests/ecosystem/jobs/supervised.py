"""A LightningModule around a plain net, for packages without one, and a quiet Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["QUIET", "Supervised", "fit", "loader"]

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class Supervised(pl.LightningModule):
    """Minimises a loss of (output, target)."""

    def __init__(
        self, net: nn.Module, loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy
    ) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *inputs: Any) -> Any:
        return self.net(*inputs)

    def training_step(self, batch: Sequence[Any], index: int) -> Tensor:
        *inputs, target = batch
        return self.loss(self(*inputs), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    module: pl.LightningModule,
    data: Any,
    callbacks: list[Any],
    ckpt: str | None,
    *,
    weights_only: bool | None = None,
    validation: Any = None,
    **options: Any,
) -> None:
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **{**QUIET, **options})
    trainer.fit(module, data, validation, ckpt_path=ckpt, weights_only=weights_only)


def loader(*tensors: Tensor, batch_size: int = 4) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True)
