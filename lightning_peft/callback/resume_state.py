"""What a checkpoint holds for the Trainer's resume: random states and optimizer names."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lightning_peft.callback.gather_rng import gather_rng
from lightning_peft.callback.optimizer_setup import optimizer_names
from lightning_peft.checkpoint.contents import KEY
from lightning_peft.checkpoint.rng_state import restore_rng
from lightning_peft.trainers.packages import is_fitting

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["ResumeState"]


class ResumeState:
    """State of a loaded checkpoint that waits until fit starts."""

    def __init__(self) -> None:
        self._rng: list[dict[str, Any]] | None = None
        self._iterated_early = False

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Add random states and optimizer names to a checkpoint, once."""
        if KEY not in checkpoint:
            names = optimizer_names(trainer)
            checkpoint[KEY] = {"rng": gather_rng(trainer), "optimizers": names}

    def load(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Keep the state for `restore`; restore it now if the strategy loads after setup."""
        if not is_fitting(trainer):
            return
        late = trainer.strategy.restore_checkpoint_after_setup  # on_fit_start is over
        states = (checkpoint.get(KEY) or {}).get("rng")
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

    def restore(self, trainer: pl.Trainer) -> None:
        """Restore what `load` kept."""
        if self._rng is not None:
            # Later is too late: the first data iterator draws a seed before on_train_start.
            self._iterated_early = trainer.train_dataloader is not None
            restore_rng(self._rng[trainer.global_rank], trainer.strategy.root_device)
            self._rng = None

    def iterate_again(self, trainer: pl.Trainer) -> None:
        """Start the data anew if it was started before the state of the run was restored.

        A `configure_optimizers` that reads `trainer.estimated_stepping_batches` does that. The
        first iterator drew its seed from another random state, and a stateful loader began at its
        first batch.
        """
        if self._iterated_early:
            self._iterated_early = False
            loop = trainer.fit_loop
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)  # type: ignore[arg-type]  # on_train_start: it is there
