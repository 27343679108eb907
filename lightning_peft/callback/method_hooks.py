"""Runs the hooks of methods around each optimizer step: penalties, schedules, budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.methods.base import StepContext, WeightMethod

__all__ = ["MethodHooks"]


class MethodHooks:
    """Runs the hooks of methods that have any: penalty and after_backward before clipping,
    after_step behind the step.

    Attributes:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._total: int | None = None
        self._asked = False

    def _groups(self, optimizer: Optimizer) -> list[tuple[WeightMethod, list[Adapter]]]:
        """(method, its adapters that this optimizer trains), for methods with a hook."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups: dict[tuple[str, int], tuple[WeightMethod, list[Adapter]]] = {}
        for _, module in adapted_modules(self.module):
            for adapter in adapters_of(module):
                if has_step_hooks(adapter.method) and any(
                    id(p) in owned for p in adapter.parameters()
                ):
                    key = (adapter.adapter_name, id(adapter.method))
                    groups.setdefault(key, (adapter.method, []))[1].append(adapter)
        return list(groups.values())

    def before_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Gradients are complete, unscaled where the precision plugin unscales, not clipped yet."""
        for method, adapters in self._groups(optimizer):
            ctx = self._context(
                trainer, adapters, trainer.global_step, _grad_scale(trainer, optimizer)
            )
            with torch.enable_grad():
                penalty = method.penalty(ctx)
            if penalty is not None:
                _add_gradient(penalty * ctx.grad_scale, adapters)
            method.after_backward(ctx)

    def after_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Weights have moved, gradients are still there; not called when a step is skipped."""
        for method, adapters in self._groups(optimizer):
            ctx = self._context(trainer, adapters, trainer.global_step + 1, 1.0)
            with torch.no_grad():
                method.after_step(ctx)

    def follow(self, trainer: pl.Trainer, optimizers: Sequence[Optimizer]) -> None:
        """Have `after_step` called behind each optimizer's step."""
        for optimizer in optimizers:
            if self._groups(optimizer):
                optimizer.register_step_post_hook(lambda o, *_: self.after_step(trainer, o))

    def _context(
        self, trainer: pl.Trainer, adapters: Sequence[Adapter], step: int, scale: float
    ) -> StepContext:
        if not self._asked:
            self._asked = True
            total = trainer.estimated_stepping_batches
            self._total = int(total) if 0 < total < float("inf") else None
        return StepContext(step, self._total, [(a.site, a.tensors()) for a in adapters], scale)


def has_step_hooks(method: Any) -> bool:
    """Whether the method's class has a hook of its own."""
    return isinstance(method, WeightMethod) and any(
        getattr(type(method), hook) is not getattr(WeightMethod, hook)
        for hook in ("penalty", "after_backward", "after_step")
    )


def _grad_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """What gradients are multiplied with here: a fused optimizer unscales them itself, later."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def _add_gradient(penalty: Tensor, adapters: Sequence[Adapter]) -> None:
    parameters = [p for a in adapters for p in a.parameters() if p.requires_grad]
    for p, grad in zip(
        parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True
    ):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad.add_(grad)
