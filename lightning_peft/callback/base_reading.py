"""Reads a base that was built on the meta device, under every strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft.core.names import in_adapter
from lightning_peft.strategies.base_reading import meta_tensors, read_into

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_base", "errors_on_meta", "packed_device", "read_meta_base"]


def check_base(trainer: pl.Trainer, root: nn.Module, base_from: str | Path | None) -> None:
    """Raise where a folder and a model do not fit, before adapters are attached.

    Raises:
        ValueError: a folder for a base that is in memory.
        RuntimeError: a base on the meta device without a folder.
    """
    strategy: Any = trainer.strategy
    options = getattr(strategy, "options", None)
    folder = base_from or getattr(options, "base_from", None)
    empty = [name for name in meta_tensors(root) if not in_adapter(name)]
    if folder is not None and not empty:
        raise ValueError(
            f"PEFT base_from: expected a base on the meta device, to be read from {folder}, got "
            f"{type(root).__name__} in memory; build it inside `with torch.device('meta'):`, or "
            "leave base_from out"
        )
    if folder is None and empty:
        raise RuntimeError(
            f"PEFT: expected weights, got {len(empty)} tensors of {type(root).__name__} on the "
            f"meta device ({', '.join(empty[:3])}); give PEFT(base_from=<folder of safetensors>)"
        )


@contextmanager
def errors_on_meta(module: nn.Module) -> Iterator[None]:
    """Keep an error that is raised inside the block while the module has no values.

    Lightning's teardown calls `module.cpu()` after an error. On the meta device that raises an
    error of its own, which would take the place of the first one.
    """
    try:
        yield
    except BaseException:
        if meta_tensors(module):
            object.__setattr__(module, "cpu", partial(_stay, module))
        raise


def _stay(module: nn.Module) -> nn.Module:
    """Stand in for one call of `module.cpu()`."""
    vars(module).pop("cpu", None)
    return module


def packed_device(trainer: pl.Trainer) -> torch.device | None:
    """Return where packed layers wait until they are sharded; None if they stay where they are.

    FSDP2 moves a unit to its device when it shards it, so no device holds the complete base.
    """
    return torch.device("cpu") if hasattr(trainer.strategy, "read_base_from") else None


def read_meta_base(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    base_from: str | Path | None,
    packed_cache: str | Path | None,
) -> None:
    """Read the base into an adapted module; a strategy that shards reads it after sharding."""
    strategy: Any = trainer.strategy
    take = getattr(strategy, "read_base_from", None)
    if base_from is None:
        return
    if take is not None:
        take(base_from, packed_cache)
    elif meta_tensors(module):
        device = strategy.root_device
        read_into(module, base_from, place=device, device=device, packed_cache=packed_cache)
