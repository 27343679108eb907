"""After the user's `configure_optimizers`: swap, repair, check; schedules at each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.checkpoint.contents import KEY
from lightning_peft.layers.adapted import Adapter, adapted_modules, adapters_of
from lightning_peft.methods.base import Context, WeightMethod
from lightning_peft.optim import in_live_order, loraplus_groups, names_of, repair, swap

__all__ = [
    "Schedules",
    "align_optimizer_states",
    "finish_optimizers",
    "install_optimizer_setup",
    "layers_of",
    "optimizer_names",
]

Finish = Callable[[pl.Trainer], None]


def install_optimizer_setup(
    strategy: Strategy, owner: object, begin: Finish, finish: Finish
) -> None:
    """Have `begin` and `finish` called before and after the strategy makes its optimizers; every
    fit, once an owner.

    Lightning calls `setup_optimizers` before the precision plugin, the learning-rate finder and the
    restoring of state
    see them; `on_fit_start` would be too late.
    """
    around: dict[int, tuple[Finish, Finish]] | None
    around = getattr(strategy.setup_optimizers, "peft_around", None)
    if around is not None:
        around[id(owner)] = begin, finish
        return
    original = strategy.setup_optimizers
    calls: dict[int, tuple[Finish, Finish]] = {id(owner): (begin, finish)}

    def setup_optimizers(trainer: pl.Trainer) -> None:
        for before, _ in calls.values():
            before(trainer)
        original(trainer)
        for _, after in calls.values():
            after(trainer)

    setup_optimizers.peft_around = calls  # type: ignore[attr-defined]
    object.__setattr__(strategy, "setup_optimizers", setup_optimizers)


def layers_of(root: nn.Module, prefix: str) -> dict[str, list[Any]]:
    """Weak references to every module's own parameters, by name: an early optimizer holds them."""
    return {
        f"{prefix}.{name}".strip("."): [weakref.ref(p) for p in module.parameters(recurse=False)]
        for name, module in root.named_modules()
    }


def finish_optimizers(
    module: nn.Module,
    strategy: Strategy,
    layers: Mapping[str, Sequence[Any]],
    name: str | None,
) -> None:
    """Repair optimizers that were built before the adapters, check them, swap their class if asked.

    Args:
        module: The LightningModule.
        strategy: Holds the optimizers and their proxies.
        layers: What `layers_of` saw before anything was attached.
        name: Of the optimizer to put in place of the user's.

    Raises:
        RuntimeError: a trained parameter is in no optimizer (`configure_optimizers` may have
            returned None) or in several.
    """
    optimizers = strategy.optimizers
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def bases(parameter: str) -> list[Tensor]:
        owner = parameter.rpartition(".peft.")[0]
        return [p for reference in layers.get(owner, ()) if (p := reference()) is not None]

    repair(optimizers, trained, bases)
    schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
    for ratio, fast in _rates(module).items():
        named = [(n, p) for n, p in trained.items() if id(p) in fast]
        for optimizer in optimizers:
            if getattr(optimizer, "_peft_rates", None) != ratio:  # a second fit may bring it again
                loraplus_groups(
                    optimizer,
                    named,
                    ratio,
                    [s for s in schedulers if getattr(s, "optimizer", None) is optimizer],
                    is_fast=lambda *_: True,
                )
                optimizer._peft_rates = ratio  # type: ignore[attr-defined]
    if name is not None:
        for optimizer in optimizers:
            swap(optimizer, name)
    strategy.optimizers = optimizers  # makes Lightning's proxies again: they carry the class's name


def optimizer_names(trainer: pl.Trainer) -> list[list[list[str]]]:
    """Names of the parameters of every optimizer, by group."""
    named = dict(trainer.lightning_module.named_parameters())
    return [names_of(optimizer, named) for optimizer in trainer.strategy.optimizers]


def align_optimizer_states(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Number the states in a checkpoint as the live optimizers do, in place.

    Files without names (of other code) keep the order they have.

    Raises:
        ValueError: another set of parameters, or groups; with the names.
    """
    ours = checkpoint.get(KEY) or {}
    states, saved = checkpoint.get("optimizer_states"), ours.get("optimizers")
    if not states or not saved:
        return
    live = optimizer_names(trainer)
    if not len(states) == len(saved) == len(live):
        raise ValueError(
            f"optimizer states: expected {len(states)} optimizers, as in the checkpoint, got "
            f"{len(live)} from configure_optimizers"
        )
    checkpoint["optimizer_states"] = [
        in_live_order(state, then, now, f"state of optimizer {i}")
        for i, (state, then, now) in enumerate(zip(states, saved, live, strict=True))
    ]
    checkpoint[KEY] = {**ours, "optimizers": live}


def _rates(module: nn.Module) -> dict[float, set[int]]:
    """Factor of the learning rate → ids of the tensors that have it."""
    factors: dict[float, set[int]] = {}
    for _, adapted in adapted_modules(module):
        for adapter in adapters_of(adapted):
            if isinstance(adapter.method, WeightMethod):
                tensors = adapter.tensors()
                for key, factor in adapter.method.rates(adapter.site).items():
                    if key in tensors and factor != 1.0:
                        factors.setdefault(factor, set()).add(id(tensors[key]))
    return factors


class Schedules:
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
                if has_schedule(adapter.method) and any(
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
    ) -> Context:
        if not self._asked:
            self._asked = True
            total = trainer.estimated_stepping_batches
            self._total = int(total) if 0 < total < float("inf") else None
        return Context(step, self._total, [(a.site, a.tensors()) for a in adapters], scale)


def has_schedule(method: Any) -> bool:
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
