"""Checks of a run before its model is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.description import is_attached
from lightning_peft.checkpoint.shard_folder import check_shared
from lightning_peft.trainers.packages import callbacks_of, is_instance_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_adapted", "check_folders", "check_no_averages", "check_precision"]

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def check_adapted(module: nn.Module, remedy: str) -> None:
    """Raise RuntimeError, with what to do, unless the module has adapters."""
    if not is_attached(module):
        raise RuntimeError(f"peft_fsdp: expected adapters, found none; {remedy}")


def check_precision(precision: str) -> None:
    """Raise ValueError for ``"16-mixed"``, which scales gradients."""
    if precision == "16-mixed":
        raise ValueError(
            "peft_fsdp: expected 32-true, bf16-mixed, bf16-true or 16-true, got precision "
            "'16-mixed'; use 'bf16-mixed'"
        )


def check_no_averages(trainer: pl.Trainer) -> None:
    """Raise ValueError if a callback averages weights."""
    for callback in callbacks_of(trainer):
        if any(is_instance_of(callback, name) for name in _AVERAGING):
            raise ValueError(
                f"peft_fsdp: expected no {type(callback).__name__}: it averages a copy that was "
                "made before sharding; use strategy='peft_ddp'"
            )


def check_folders(trainer: pl.Trainer) -> None:
    """Raise on every rank unless all ranks see the folders of ModelCheckpoint callbacks."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    for folder in trainer.strategy.broadcast(folders):
        if folder is not None and atomic_file.is_local(folder):
            check_shared(Path(folder))
