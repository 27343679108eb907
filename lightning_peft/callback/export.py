"""Exports the adapters of the best checkpoint when training ends: `PEFT(export_to=...)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.contents import load_kept
from lightning_peft.checkpoint.kept import kept_tensors
from lightning_peft.checkpoint.shard_folder import is_folder, read_folder
from lightning_peft.hf.save import save_adapter

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["export_best"]


def export_best(
    trainer: pl.Trainer, module: pl.LightningModule, names: Sequence[str], directory: str | Path
) -> None:
    """Write every adapter of the best checkpoint, or the current ones if there is none.

    The module is as before afterwards.

    Args:
        trainer: The Trainer, at the end of fit.
        module: The LightningModule.
        names: Names of the adapters.
        directory: Where to write.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    with _values_of(module, _best_path(trainer)):
        for name in names:
            save_adapter(module, directory, adapter_name=name, metrics=metrics)


def _best_path(trainer: pl.Trainer) -> str:
    """Path of the best checkpoint; "" if no checkpoint was written."""
    saver: Any = trainer.checkpoint_callback
    return str(getattr(saver, "best_model_path", "") or "")


@contextmanager
def _values_of(module: nn.Module, path: str) -> Iterator[None]:
    """Within the block, the module holds the values of a checkpoint."""
    if not path:
        yield
        return
    before = {key: tensor.detach().clone() for key, tensor in kept_tensors(module).items()}
    checkpoint = read_folder(path) if is_folder(path) else atomic_file.read(path)
    load_kept(module, checkpoint["state_dict"])
    try:
        yield
    finally:
        load_kept(module, before)
