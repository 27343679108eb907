"""Resumes a `BaseFinetuning` callback that had unfrozen a part outside of the adapted root.

Lightning freezes the part again when a resumed run starts, and unfreezes it at its epoch only. A
run that resumes after that epoch would never train it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_peft.core.names import in_adapter, strip_compile
from lightning_peft.trainers.packages import callbacks_of, is_instance_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["has_finetuning", "trained_outside", "unfreeze_again"]


def has_finetuning(trainer: pl.Trainer) -> bool:
    """Whether a callback of the Trainer freezes and unfreezes parts."""
    return any(is_instance_of(callback, "BaseFinetuning") for callback in callbacks_of(trainer))


def trained_outside(module: nn.Module) -> list[str]:
    """Names of the parameters that are trained and belong to no adapter."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    return [strip_compile(name) for name in names if not in_adapter(name)]


def unfreeze_again(module: nn.Module, root: nn.Module, names: Collection[str]) -> None:
    """Unfreeze what was trained when the checkpoint was written, outside of `root`."""
    adapted = {id(p) for p in root.parameters()}
    for prefix, owner in module.named_modules():
        for name, p in owner.named_parameters(prefix, recurse=False):
            if strip_compile(name) not in names or p.requires_grad or id(p) in adapted:
                continue
            p.requires_grad_(True)
            if isinstance(owner, _BatchNorm):
                owner.track_running_stats = True  # switched off with the parameters
