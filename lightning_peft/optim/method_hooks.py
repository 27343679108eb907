"""Runs penalties and schedules of methods around each optimizer step, in any training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.methods.base import SequenceMethod, StepContext, WeightMethod
from lightning_peft.optim.half_precision import check_half_precision
from lightning_peft.optim.wrappers import unwrap_optimizer

__all__ = ["MethodHooks", "has_step_hooks"]

_Method = WeightMethod | SequenceMethod


class MethodHooks:
    """Runs the step hooks of methods that have any: AdaLoRA's budget, diff pruning's penalty.

    Under a Trainer the PEFT callback does this. In a loop of your own, one call is needed:

        hooks = MethodHooks(model, optimizer, total_steps=1000)
        for batch in batches:
            loss(model, batch).backward()
            hooks.before_step(optimizer)  # before clipping
            optimizer.step()  # the hooks that follow a step run by themselves
            optimizer.zero_grad()

    Args:
        module: The adapted model. Wrappers of Fabric or DDP may be around it.
        optimizers: One optimizer or several. Wrappers of Fabric and accelerate are accepted.
        total_steps: Optimizer steps of the whole run; None if unknown. Schedules that need it say
            so.

    Attributes:
        module: The adapted model.
        step: Optimizer steps so far. `state_dict` keeps it for a resumed run.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer] = (),
        *,
        total_steps: int | None = None,
    ) -> None:
        self.module = module
        self.step = 0
        self._total = total_steps
        given = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
        for optimizer in map(unwrap_optimizer, given):
            optimizer.register_step_post_hook(lambda o, *_: self.after_step(o))

    def current_step(self) -> int:
        """Return the number of optimizer steps so far."""
        return self.step

    def total_steps(self) -> int | None:
        """Return the number of optimizer steps of the whole run; None if unknown."""
        return self._total

    def state_dict(self) -> dict[str, Any]:
        """Return the step count, for `save_checkpoint(..., hooks=hooks)`."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step count."""
        self.step = int(state["step"])

    def _groups(self, optimizer: Optimizer) -> list[tuple[_Method, list[Adapter]]]:
        """Return each method with a hook, and those of its adapters that `optimizer` trains."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups: dict[tuple[str, int], tuple[_Method, list[Adapter]]] = {}
        for _, module in adapted_modules(self.module):
            for adapter in adapters_of(module):
                method = adapter.method
                if (
                    isinstance(method, WeightMethod | SequenceMethod)
                    and method.has_step_hooks
                    and any(id(p) in owned for p in adapter.parameters())
                ):
                    key = (adapter.adapter_name, id(method))
                    groups.setdefault(key, (method, []))[1].append(adapter)
        return list(groups.values())

    def before_step(self, optimizer: Optimizer, grad_scale: float = 1.0) -> None:
        """Add penalties to the gradients and run schedules that read them.

        Call it when gradients are complete and not clipped yet.

        Args:
            optimizer: The optimizer whose step follows.
            grad_scale: Factor of a GradScaler that the gradients still carry.

        Raises:
            ValueError: the step would make float16 adapters NaN.
        """
        check_half_precision(unwrap_optimizer(optimizer))
        for method, adapters in self._groups(unwrap_optimizer(optimizer)):
            ctx = self._context(adapters, self.current_step(), grad_scale)
            with torch.enable_grad():
                penalty = method.penalty(ctx)
            if penalty is not None:
                _add_gradient(penalty * ctx.grad_scale, adapters)
            method.after_backward(ctx)

    def after_step(self, optimizer: Optimizer) -> None:
        """Run schedules that follow a step. A hook on the optimizer calls this.

        Weights have moved and gradients are still there. A skipped step does not call it.
        """
        for method, adapters in self._groups(optimizer):
            ctx = self._context(adapters, self.current_step() + 1, 1.0)
            with torch.no_grad():
                method.after_step(ctx)
        self.step += 1

    def _context(self, adapters: Sequence[Adapter], step: int, scale: float) -> StepContext:
        entries = [(a.site, a.tensors()) for a in adapters]
        return StepContext(step, self.total_steps(), entries, scale)


def has_step_hooks(method: object) -> bool:
    """Whether the method has a hook of its own."""
    return isinstance(method, WeightMethod | SequenceMethod) and method.has_step_hooks


def _add_gradient(penalty: Tensor, adapters: Sequence[Adapter]) -> None:
    parameters = [p for a in adapters for p in a.parameters() if p.requires_grad]
    for p, grad in zip(
        parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True
    ):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad.add_(grad)
