"""Step hooks of methods under a Trainer, which knows the step and the length of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.optim.method_hooks import MethodHooks

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["TrainerMethodHooks", "grad_scale"]


class TrainerMethodHooks(MethodHooks):
    """Step hooks whose step and length of the run come from the Trainer.

    Args:
        trainer: The Trainer of the run.
        optimizers: Its optimizers, unwrapped.
    """

    def __init__(self, trainer: pl.Trainer, optimizers: Sequence[Optimizer]) -> None:
        self._trainer = trainer
        super().__init__(trainer.lightning_module)
        self._estimated = False
        for optimizer in optimizers:
            if self._groups(optimizer):
                optimizer.register_step_post_hook(lambda o, *_: self.after_step(o))

    @override
    def current_step(self) -> int:
        return self._trainer.global_step

    @override
    def total_steps(self) -> int | None:
        if not self._estimated:  # the estimate may load the data, so only methods with hooks ask
            self._estimated = True
            total = self._trainer.estimated_stepping_batches
            self._total = int(total) if 0 < total < float("inf") else None
        return self._total


def grad_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return the factor that gradients carry before a step.

    It differs from 1 only under a GradScaler with a fused optimizer, which unscales by itself.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
