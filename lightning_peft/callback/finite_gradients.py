"""Skips steps with non-finite gradients under strategies that do not do so themselves."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.strategies.fault_guards import GradientGuard

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["FiniteGradients"]


class FiniteGradients(GradientGuard):
    """Skips a step whose gradients are not all finite, and ends the run after ten in a row.

    A GradScaler skips steps by itself, so nothing is added to it. On CUDA the host does not wait
    for an optimizer that reads `found_inf` (fused, or of this package): the step is skipped on the
    device, and the count is read one step later. Other optimizers need the answer on the host.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, torch.cuda.Event]] = []

    def before_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> bool:
        """Check the gradients of an optimizer; return False if its step is skipped.

        Raises:
            RuntimeError: `max_skips` steps in a row were skipped.
        """
        strategy = trainer.strategy
        if isinstance(strategy, GradientGuard):
            return True
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return True
        device = strategy.root_device
        if device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False):
            self._on_device(optimizer, device)
            return True
        before = self.skipped_steps
        self.drop_nonfinite(optimizer, device)
        return self.skipped_steps == before

    def _on_device(self, optimizer: Optimizer, device: torch.device) -> None:
        """Let the optimizer's kernel skip the step, and count skips of earlier steps."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None and p.grad.numel()]
        if not grads:
            return
        peaks = torch.stack([n.float() for n in torch._foreach_norm(grads, float("inf"))])
        found = (~peaks.isfinite().all()).float()
        vars(optimizer)["found_inf"] = found
        flag = torch.empty((), pin_memory=True)
        flag.copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((flag, event))
        while self._pending and self._pending[0][1].query():
            self._count(bool(self._pending.pop(0)[0]))

    def _count(self, skipped: bool) -> None:
        if not skipped:
            self._consecutive_skips = 0
            return
        self.skipped_steps += 1
        self._consecutive_skips += 1
        if self._consecutive_skips >= self.max_skips:
            raise self.too_many_skips()
        warnings.warn(self.skip_message(), stacklevel=3)
