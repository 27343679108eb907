"""Exports the adapters of the best checkpoint when training ends: `PEFT(export_to=...)`."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.callback.checkpoint_io import PEFTCheckpointIO
from lightning_peft.checkpoint.contents import load_kept
from lightning_peft.checkpoint.kept import kept_tensors
from lightning_peft.hf.adapter_files import adapter_files
from lightning_peft.hf.files import require_directory
from lightning_peft.hf.save import save_adapter
from lightning_peft.models.modules import fork_seeded_rng
from lightning_peft.storage.dtensor import is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_exportable", "export_best"]


def check_exportable(
    module: pl.LightningModule, names: Sequence[str], directory: str | Path
) -> None:
    """Raise before training where the export after it would be refused; nothing is written.

    The adapters are brought into the form of their files, as they are at the start. Trained tensors
    that are still zero count as not zero: a file may have no place for their later values.

    Raises:
        FileExistsError: a file is in the place of the directory or of a parent.
        ValueError: a method that peft does not have for one of the layers, a sharded model, or a
            directory that cannot be written.
    """
    if any(is_sharded(p) for p in module.parameters()):
        raise ValueError(
            "PEFT export_to: expected a model that each process holds completely, got a sharded "
            "one; leave export_to out, and after training call save_adapter(load_from_checkpoint("
            "MyModule, path), directory) in one process"
        )
    _check_directory(Path(directory))
    for name in names:
        try:
            # Prompts draw dropout; the run's own draws stay.
            with fork_seeded_rng(0), _without_zeros(module):
                adapter_files(module, directory, name)
        except ValueError as error:
            raise ValueError(
                f"PEFT export_to: the export at the end of training would fail: {error}; or leave "
                "export_to out: checkpoints hold every adapter"
            ) from error


def _check_directory(directory: Path) -> None:
    """Raise if the directory cannot be made; it is made at the end."""
    require_directory(directory, "PEFT export_to")
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"PEFT export_to: expected a directory that can be written, got {directory} inside "
            f"{place}, which is read-only; give another one"
        )


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
    with _values_of(module, _best_state(trainer)):
        for name in names:
            save_adapter(module, directory, adapter_name=name, metrics=metrics)


def _best_state(trainer: pl.Trainer) -> Mapping[str, Tensor]:
    """Tensors of the best checkpoint; none, with a warning, if its file cannot be read any more."""
    saver: Any = trainer.checkpoint_callback
    path = str(getattr(saver, "best_model_path", "") or "")
    io: Any = trainer.strategy.checkpoint_io
    if not path or not isinstance(io, PEFTCheckpointIO):
        return {}
    try:
        state: Mapping[str, Tensor] = io.read_again(path)["state_dict"]
        return state
    # Training is over, and the current values are better than no export.
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        warnings.warn(
            f"PEFT export_to: expected to read the best checkpoint again, got: {error}. The "
            "current values are exported instead",
            stacklevel=2,
        )
        return {}


@contextmanager
def _without_zeros(module: nn.Module) -> Iterator[None]:
    """Within the block, trained tensors that are zero hold ones, as if training had moved them."""
    zeros = [p for p in module.parameters() if p.requires_grad and not p.any()]
    with torch.no_grad():
        for p in zeros:
            p.fill_(1)
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


@contextmanager
def _values_of(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, the module holds the values of a checkpoint."""
    if not state:
        yield
        return
    before = {key: tensor.detach().clone() for key, tensor in kept_tensors(module).items()}
    load_kept(module, state)
    try:
        yield
    finally:
        load_kept(module, before)
