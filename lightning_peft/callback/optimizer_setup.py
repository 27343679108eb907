"""Repairs, checks and converts optimizers after the user's `configure_optimizers`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.checkpoint.description import KEY
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.methods.base import WeightMethod
from lightning_peft.optim import convert_optimizer, in_live_order, loraplus_groups, names_of, repair

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "align_optimizer_states",
    "finish_optimizers",
    "install_optimizer_setup",
    "layers_of",
    "optimizer_names",
]

Step = Callable[["pl.Trainer"], None]


class OptimizerSetup:
    """Runs our steps before and after the strategy creates its optimizers.

    Its bound method `run` is an instance attribute of the strategy. Lightning calls
    `setup_optimizers` before the precision plugin, the learning-rate finder and the restored state
    see the optimizers; `on_fit_start` would be too late.

    Attributes:
        steps: What to run before and after, by the id of the callback that asked.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.original = strategy.setup_optimizers
        self.steps: dict[int, tuple[Step, Step]] = {}

    def run(self, trainer: pl.Trainer) -> None:
        """Called when the strategy is to create its optimizers."""
        for before, _ in self.steps.values():
            before(trainer)
        self.original(trainer)
        for _, after in self.steps.values():
            after(trainer)


def install_optimizer_setup(strategy: Strategy, owner: object, begin: Step, finish: Step) -> None:
    """Call `begin` before and `finish` after the strategy creates its optimizers, in every fit.

    A second call for the same owner replaces the first.
    """
    setup = getattr(strategy.setup_optimizers, "__self__", None)
    if not isinstance(setup, OptimizerSetup):
        setup = OptimizerSetup(strategy)
        object.__setattr__(strategy, "setup_optimizers", setup.run)
    setup.steps[id(owner)] = begin, finish


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
                vars(optimizer)["_peft_rates"] = ratio
    if name is not None:
        for optimizer in optimizers:
            convert_optimizer(optimizer, name)
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
                for key, factor in adapter.method.lr_multipliers(adapter.site).items():
                    if key in tensors and factor != 1.0:
                        factors.setdefault(factor, set()).add(id(tensors[key]))
    return factors
