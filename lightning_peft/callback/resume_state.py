"""What a checkpoint holds for the Trainer's resume.

Random states, optimizer names, and the gradients of an open accumulation window.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.callback.accumulated_gradients import (
    Gradients,
    gather_gradients,
    restore_gradients,
)
from lightning_peft.callback.finetuning import (
    has_finetuning,
    trained_outside,
    unfreeze_again,
)
from lightning_peft.callback.gather_rng import gather_rng
from lightning_peft.callback.optimizer_setup import optimizer_entry
from lightning_peft.checkpoint.contents import KEY
from lightning_peft.checkpoint.rng_state import restore_rng
from lightning_peft.trainers.packages import callbacks_of, is_fitting, is_instance_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["ResumeState"]


class ResumeState:
    """State of a loaded checkpoint that waits until fit and training start."""

    def __init__(self) -> None:
        self._rng: list[dict[str, Any]] | None = None
        self._iterated_early = False
        self._gradients: list[Gradients] | None = None
        self._trained: list[str] = []
        self._loaded = self._resumed = False

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Add the state to a checkpoint, once."""
        if KEY in checkpoint:
            return
        checkpoint[KEY] = {"rng": gather_rng(trainer), **optimizer_entry(trainer)}
        if has_finetuning(trainer):
            checkpoint[KEY]["trained"] = trained_outside(trainer.lightning_module)
        gradients = gather_gradients(trainer)
        if gradients is not None:
            checkpoint[KEY]["gradients"] = gradients

    def load(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Keep the state until it is restored; restore random states if the strategy is late."""
        if not is_fitting(trainer):
            return
        entry = checkpoint.get(KEY) or {}
        self._loaded, self._gradients = True, entry.get("gradients")
        self._trained = entry.get("trained") or []
        late = trainer.strategy.restore_checkpoint_after_setup  # on_fit_start is over
        states = entry.get("rng")
        if states is None:
            return
        if len(states) != trainer.world_size:
            if trainer.is_global_zero:
                warnings.warn(
                    f"PEFT: the checkpoint holds random states of {len(states)} processes, this "
                    f"run has {trainer.world_size}; dropout and data order go on from the seed "
                    "instead",
                    stacklevel=3,
                )
            return
        if late:
            self._iterated_early = trainer.train_dataloader is not None
            restore_rng(states[trainer.global_rank], trainer.strategy.root_device)
            return
        self._rng = states

    def restore(self, trainer: pl.Trainer, root: nn.Module) -> None:
        """Restore the random states, and unfreeze what was trained outside of `root`."""
        if has_finetuning(trainer):
            unfreeze_again(trainer.lightning_module, root, self._trained)
        if self._rng is not None:
            # Later is too late: the first data iterator draws a seed before on_train_start.
            self._iterated_early = trainer.train_dataloader is not None
            restore_rng(self._rng[trainer.global_rank], trainer.strategy.root_device)
            self._rng = None

    def iterate_again(self, trainer: pl.Trainer) -> None:
        """Restart the data iterator if it was created before the run's state was restored.

        A `configure_optimizers` that reads `trainer.estimated_stepping_batches` does that. The
        first iterator drew its seed from another random state, and a stateful loader began at its
        first batch.
        """
        if self._iterated_early:
            self._iterated_early = False
            loop = trainer.fit_loop
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)  # type: ignore[arg-type]  # on_train_start: it is there

    def restore_gradients(self, trainer: pl.Trainer) -> None:
        """Restore the gradients of an open window, once the loops know where they are."""
        loaded, gradients = self._loaded, self._gradients
        self._loaded, self._gradients = False, None
        if loaded:
            self._resumed = True
            restore_gradients(trainer, gradients)

    def restore_window_size(self, trainer: pl.Trainer) -> None:
        """Before the first batch: have schedules of the accumulation window's size act.

        Lightning asks them at the start of an epoch, which the run may be past.
        """
        if not self._resumed:
            return
        self._resumed = False
        for callback in callbacks_of(trainer):
            if is_instance_of(callback, "GradientAccumulationScheduler"):
                callback.on_train_epoch_start(trainer, trainer.lightning_module)
