"""Fault handling of both strategies: non-finite gradients, failed saves, exceptions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.core.collectives import raise_on_all_ranks
from lightning_peft.optim import check_half_precision
from lightning_peft.optim.state_pool import local
from lightning_peft.optim.wrappers import unwrap_optimizer
from lightning_peft.trainers.packages import is_interrupted

if TYPE_CHECKING:
    from lightning.fabric.strategies.parallel import ParallelStrategy as FabricStrategy
    from lightning.pytorch.strategies import ParallelStrategy
else:
    FabricStrategy = ParallelStrategy = object

__all__ = ["FabricGuards", "GradientGuard", "TrainerGuards"]


class GradientGuard:
    """Skips a step on all ranks if a gradient is not finite on one of them.

    Attributes:
        skipped_steps: Number of skipped optimizer steps.
        max_skips: Number of consecutive skips that stops the run on every rank.
    """

    max_skips = 10
    skipped_steps = 0
    _consecutive_skips = 0

    def drop_nonfinite(self, optimizer: Optimizer, device: torch.device) -> None:
        """Set all gradients to None if one is NaN or infinite, so that no state changes.

        Raises:
            RuntimeError: `max_skips` steps in a row were skipped.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        bad = torch.zeros((), device=device)
        sizes = torch._foreach_norm([g for g in grads if g.numel()], float("inf")) if grads else ()
        if sizes:
            peaks = torch.stack([n.float() for n in sizes]).to(device)
            bad = (~peaks.isfinite().all()).float()
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bool(bad):
            self._consecutive_skips = 0
            return
        for p in params:
            p.grad = None
        self.skipped_steps += 1
        self._consecutive_skips += 1
        if self._consecutive_skips >= self.max_skips:
            raise self.too_many_skips()
        if not dist.is_initialized() or dist.get_rank() == 0:
            warnings.warn(self.skip_message(), stacklevel=2)

    def too_many_skips(self) -> RuntimeError:
        """Return the error that ends the run."""
        return RuntimeError(
            f"gradients: expected finite ones, got NaN or infinity in {self._consecutive_skips} "
            "steps in a row; the adapters are as they were before: lower the learning rate, or "
            "look for a batch with bad values"
        )

    def skip_message(self) -> str:
        """Return the warning about one skipped step."""
        return (
            "a gradient is NaN or infinite; step left out on every process "
            f"({self.skipped_steps} so far)"
        )


class FabricGuards(GradientGuard, FabricStrategy):
    """Fault handling of a Fabric strategy. It comes before Fabric's class in the bases."""

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step on all ranks or on none: ranks agree on whether the gradients are finite.

        A GradScaler skips steps by itself, so nothing is added to it.

        Raises:
            ValueError: the step would make float16 adapters NaN.
        """
        check_half_precision(unwrap_optimizer(optimizer))
        if getattr(self.precision, "scaler", None) is not None:
            return super().optimizer_step(optimizer, **kwargs)
        closure: Callable[[], Any] | None = kwargs.pop("closure", None)
        if closure is None:
            self.drop_nonfinite(optimizer, self.root_device)
            return super().optimizer_step(optimizer, **kwargs)

        def checked() -> Any:
            result = closure()
            self.drop_nonfinite(optimizer, self.root_device)
            return result

        return super().optimizer_step(optimizer, closure=checked, **kwargs)


class TrainerGuards(GradientGuard, ParallelStrategy):
    """Fault handling of a Trainer strategy. It comes before Lightning's class in the bases."""

    knows_peft = True

    # ---- gradients

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Step on all ranks or on none: ranks agree on whether the gradients are finite.

        A GradScaler skips steps by itself, so nothing is added to it.
        """
        if getattr(self.precision_plugin, "scaler", None) is not None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        def checked() -> Any:
            result = closure()
            self.drop_nonfinite(optimizer, self.root_device)
            return result

        return super().optimizer_step(optimizer, checked, model, **kwargs)

    # ---- saving

    @property
    def interrupted(self) -> bool:
        """Whether the Trainer handles an exception, so that other ranks may be anywhere."""
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        return trainer is not None and is_interrupted(trainer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None
    ) -> None:
        """Write the checkpoint; if one rank cannot, all ranks raise.

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
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object
    ) -> None:
        """Write this rank's part of the checkpoint."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint on every rank; if one rank cannot, all ranks raise.

        Raises:
            FileNotFoundError: a rank does not see the file.
            ValueError: the checkpoint does not belong to the model.
        """
        error: Exception | None = None
        found: dict[str, Any] = {}
        try:
            found = self.read_checkpoint(checkpoint_path, weights_only)
        except Exception as caught:
            error = caught
        raise_on_all_ranks(error, f"loading {checkpoint_path}")
        return found

    def read_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None
    ) -> dict[str, Any]:
        """Read a checkpoint on this rank."""
        found: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        return found

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, except while an exception is handled, when none may come."""
        if not self.interrupted:
            super().barrier(*args, **kwargs)  # type: ignore[safe-super]
