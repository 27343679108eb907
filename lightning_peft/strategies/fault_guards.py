"""What both strategies do about faults: non-finite gradients, failed saves, exceptions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch.optim import Optimizer

from lightning_peft.optim.state_pool import local
from lightning_peft.strategies.collectives import raise_on_all_ranks

__all__ = ["Guards"]


class Guards(ParallelStrategy):
    """Mixin, before the Lightning strategy among the bases.

    Attributes:
        skipped_steps: Optimizer steps left out because a gradient was not finite on some process.
        max_skips: That many in a row stop the run, on every process.
    """

    knows_peft = True
    max_skips = 10
    skipped_steps = 0
    _skips_in_a_row = 0

    # ---- gradients

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """A step that all processes take or none: after backward they agree on finiteness.

        With a GradScaler, which skips by itself, nothing is added.
        """
        if getattr(self.precision_plugin, "scaler", None) is not None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        def checked() -> Any:
            result = closure()
            self._drop_nonfinite(optimizer)
            return result

        return super().optimizer_step(optimizer, checked, model, **kwargs)

    def _drop_nonfinite(self, optimizer: Optimizer) -> None:
        """Set all gradients to None where one is NaN or infinite: no state is touched then."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        bad = torch.zeros((), device=self.root_device)
        sizes = torch._foreach_norm([g for g in grads if g.numel()], float("inf")) if grads else ()
        if sizes:
            peaks = torch.stack([n.float() for n in sizes]).to(self.root_device)
            bad = (~peaks.isfinite().all()).float()
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bool(bad):
            self._skips_in_a_row = 0
            return
        for p in params:
            p.grad = None
        self.skipped_steps += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row >= self.max_skips:
            raise RuntimeError(
                f"gradients: expected finite ones, got NaN or infinity in {self._skips_in_a_row} "
                "steps in a row; the adapters are as they were before: lower the learning rate, "
                "or look for a batch with bad values"
            )
        if self.is_global_zero:
            warnings.warn(
                f"a gradient is NaN or infinite; step left out on every process "
                f"({self.skipped_steps} so far)",
                stacklevel=2,
            )

    # ---- saving

    @property
    def interrupted(self) -> bool:
        """Whether an exception is being handled: other processes may be anywhere."""
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write; where one process cannot, all raise.

        Raises:
            OSError: the disk is full.
        """
        error: Exception | None = None
        try:
            self.write_checkpoint(checkpoint, filepath, storage_options)
        except Exception as caught:
            if self.interrupted:
                raise
            error = caught
        if not self.interrupted:
            raise_on_all_ranks(error, f"saving {filepath}")

    def write_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None
    ) -> None:
        """This process's part of saving."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, but none while an exception is handled: nobody might come."""
        if not self.interrupted:
            super().barrier(*args, **kwargs)  # type: ignore[safe-super]
