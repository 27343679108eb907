"""Reads a base that was built on the meta device, under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.core.names import in_adapter
from lightning_peft.strategies.base_reading import meta_tensors, read_into

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_base", "read_meta_base"]


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
