"""Gradients of an open accumulation window, in the checkpoint and back on the parameters.

Lightning saves inside a window after a resume, after validation and by time. Without these
gradients the resumed run would take the window's step on its last batches alone.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from lightning_peft.core.names import strip_compile
from lightning_peft.storage.dtensor import is_sharded, local, sharded_like
from lightning_peft.strategies.unreduced_gradients import (
    set_unreduced_gradients,
    unreduced_gradients,
)
from lightning_peft.trainers.packages import is_fitting, is_interrupted

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Gradients", "gather_gradients", "restore_gradients"]

Gradients = dict[str, Tensor]


def gather_gradients(trainer: pl.Trainer) -> list[Gradients] | None:
    """Return the gradients of an open window: on rank 0 one dict per rank, by parameter name.

    Between windows the answer is None. Every rank must call it.
    """
    if not is_fitting(trainer) or not trainer.fit_loop.epoch_loop._should_accumulate():
        return None
    unreduced = unreduced_gradients(trainer.lightning_module)
    found = {
        name: unreduced.get(id(p), None if p.grad is None else local(p.grad))
        for name, p in _trained(trainer).items()
    }
    own = {n: g.detach().to("cpu", copy=True) for n, g in found.items() if g is not None}
    if trainer.world_size == 1:
        return [own]
    if is_interrupted(trainer):  # other ranks may be anywhere, so no collective can run
        return None
    gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    dist.gather_object(own, gathered)
    return gathered


def restore_gradients(trainer: pl.Trainer, gathered: list[Gradients] | None) -> None:
    """Put this rank's gradients back on its parameters; warn if an open window lost them.

    Raises:
        ValueError: the names or shapes are not those of the trained parameters.
    """
    if gathered is None or len(gathered) != trainer.world_size:
        if trainer.fit_loop.epoch_loop._should_accumulate() and trainer.is_global_zero:
            found = "none" if gathered is None else f"those of {len(gathered)} processes"
            warnings.warn(
                "PEFT: the checkpoint was saved inside an accumulation window: expected gradients "
                f"of {trainer.world_size} processes, got {found}; the next optimizer step uses "
                "the remaining batches of the window alone",
                stacklevel=3,
            )
        return
    trained = _trained(trainer)
    unreduced: dict[int, Tensor] = {}
    for name, gradient in gathered[trainer.global_rank].items():
        p = trained.get(name)
        if p is not None and is_sharded(p) and p.shape == gradient.shape:
            unreduced[id(p)] = gradient.to(p.dtype)
            continue
        if p is None or local(p).shape != gradient.shape:
            want = "a trained parameter" if p is None else f"shape {list(local(p).shape)}"
            raise ValueError(
                f"gradient of {name}: expected {want}, got shape {list(gradient.shape)} in the "
                "checkpoint; resume from a checkpoint that was saved after an optimizer step"
            )
        p.grad = sharded_like(p, gradient.to(local(p).device, p.dtype))
    set_unreduced_gradients(trainer.lightning_module, unreduced)


def _trained(trainer: pl.Trainer) -> dict[str, Tensor]:
    named = trainer.lightning_module.named_parameters()
    return {strip_compile(name): p for name, p in named if p.requires_grad}
