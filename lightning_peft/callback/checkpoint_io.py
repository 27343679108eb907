"""Two checkpoint plugins.

The outermost filters what is written and completes what is read; the innermost writes atomically.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy

from lightning_peft.callback.weight_averaging import rebuild_averages
from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.contents import (
    complete_checkpoint,
    filter_checkpoint,
    is_attached,
    leaks,
)
from lightning_peft.initialization.data_driven import waiting_adapters
from lightning_peft.strategies.sharded_checkpoint import is_folder, read_folder

__all__ = ["AtomicCheckpointIO", "PEFTCheckpointIO", "install_checkpoint_io"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plain plugin with atomic writes and plain-data reads; fsspec has remote paths."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write whole or not at all."""
        if storage_options is not None or not atomic_file.is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if is_folder(path):  # the former one is in pieces
            target = Path(path)
            fresh = target.with_name(f".{target.name}.file")
            atomic_file.write(checkpoint, fresh)
            atomic_file.publish(fresh, target)
            return
        atomic_file.write(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read plain data only, unless the caller asks for more; a folder of pieces as a whole."""
        if atomic_file.is_local(path):
            atomic_file.recover(path)
        if is_folder(path):
            return read_folder(Path(path))
        if weights_only is False or not atomic_file.is_local(path):
            place = (lambda storage, _: storage) if map_location is None else map_location
            return super().load_checkpoint(path, place, weights_only is not False)
        return atomic_file.read(path)


class PEFTCheckpointIO(CheckpointIO):
    """Outermost plugin. It holds its own references: tuners save and load while no callback is
    listed.

    Attributes:
        lost: Adapters that start again because their layers were replaced; loading fills them.
        inner: The plugin that writes.
        module: Returns the live LightningModule.
        resuming: Returns whether training goes on after loading.
        started: Whether an adapter was attached since the strategy was made; before that nothing is
            written.
    """

    def __init__(
        self,
        inner: CheckpointIO,
        module: Callable[[], LightningModule | None],
        resuming: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.inner = inner
        self.module = module
        self.resuming = resuming
        self.started = False
        self.lost: list[str] = []
        self._hparams_checked = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write adapters and trainer state, never the base."""
        module = self.module()
        attached = module is not None and is_attached(module)
        if not attached and not self.started:
            # An exception before attaching: a file without adapters would replace a good one.
            warnings.warn(f"{path}: not written: no adapter is attached yet", stacklevel=2)
            return
        if module is not None and attached and "state_dict" in checkpoint:
            checkpoint = filter_checkpoint(module, checkpoint)
            self._warn(module, checkpoint, path)
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def _warn(self, module: LightningModule, checkpoint: dict[str, Any], path: Any) -> None:
        for where in leaks(module, checkpoint):
            warnings.warn(f"{path}: {where} holds a tensor of the frozen base", stacklevel=3)
        if not self._hparams_checked:
            self._hparams_checked = True
            for field, why in _not_plain(checkpoint.get("hyper_parameters") or {}):
                warnings.warn(
                    f"{path}: hyper-parameter {field!r} is no plain data, so the file cannot be "
                    f"loaded with weights_only=True ({why}); leave it out: "
                    f"save_hyperparameters(ignore=[{field!r}])",
                    stacklevel=3,
                )

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read, check against the live model, and add the base."""
        given = {} if map_location is None else {"map_location": map_location}
        checkpoint = self.inner.load_checkpoint(path, weights_only=weights_only, **given)
        module = self.module()
        if module is None or not is_attached(module):
            return checkpoint
        self.lost = []
        waited, resuming = bool(waiting_adapters(module)), self.resuming()
        checkpoint = complete_checkpoint(module, checkpoint, os.fspath(path), resuming=resuming)
        if waited and resuming:
            rebuild_averages(module.trainer, module)  # the file's start may have other ranks
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Delegate."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Delegate: an asynchronous writer finishes here."""
        self.inner.teardown()


def install_checkpoint_io(strategy: Strategy, resuming: Callable[[], bool]) -> PEFTCheckpointIO:
    """Put our plugin outside whatever the strategy has; once a strategy."""
    found = strategy.checkpoint_io
    if isinstance(found, PEFTCheckpointIO):
        found.resuming = resuming
        return found
    ours = PEFTCheckpointIO(_atomic(found), lambda: strategy.lightning_module, resuming)
    strategy.checkpoint_io = ours
    return ours


def _atomic(io: CheckpointIO) -> CheckpointIO:
    """The atomic writer in place of Lightning's plain one; a user's own plugin stays."""
    if type(io) is TorchCheckpointIO:
        return AtomicCheckpointIO()
    if isinstance(io, AsyncCheckpointIO) and type(io.checkpoint_io) is TorchCheckpointIO:
        io._checkpoint_io = AtomicCheckpointIO()  # its setter keeps a plugin that is there
    return io


def _not_plain(hparams: dict[str, Any]) -> list[tuple[str, str]]:
    """Fields that `torch.load(weights_only=True)` would refuse, with its reason."""
    import io

    refused = []
    for field, value in hparams.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, TypeError) as error:
            refused.append((str(field), type(value).__name__ or str(error)))
    return refused
