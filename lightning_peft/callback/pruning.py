"""Refuses to prune weights that another part of the layer reads in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_peft.layers.adapted import adapters_of, is_adapted
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.storage import held_tensors
from lightning_peft.trainers.packages import callbacks_of, is_instance_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["check_pruning"]


def check_pruning(trainer: pl.Trainer, module: nn.Module) -> None:
    """Raise if a `ModelPruning` callback prunes a packed weight or a weight with a trained copy.

    Raises:
        ValueError: with the weights.
    """
    for callback in callbacks_of(trainer):
        if not is_instance_of(callback, "ModelPruning"):
            continue
        chosen = {(id(m), name) for m, name in vars(callback)["_parameters_to_prune"] or ()}
        lines = [
            f"{path}.{name}: {why}"
            for path, owner in module.named_modules()
            for name, why in _replaced(owner).items()
            if (id(owner), name) in chosen
        ]
        if lines:
            raise ValueError(
                f"{type(callback).__name__}: expected weights that the forward reads, got "
                f"{len(lines)} others; leave them out of parameters_to_prune, or out of "
                "quantization and modules_to_save:\n  " + "\n  ".join(lines[:8])
            )


def _replaced(owner: nn.Module) -> dict[str, str]:
    """Parameters of a module that its forward does not read as they are, with the reason."""
    found = dict.fromkeys(held_tensors(owner), "packed bytes")
    if is_adapted(owner):
        for adapter in adapters_of(owner):
            if isinstance(adapter, CopyAdapter):
                found |= dict.fromkeys(adapter.paths.values(), "has a trained copy")
    return found
