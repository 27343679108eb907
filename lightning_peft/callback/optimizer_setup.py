"""Repairs, checks and converts optimizers after the user's `configure_optimizers`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.checkpoint.description import KEY
from lightning_peft.checkpoint.structure import check_like
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.methods.base import WeightMethod
from lightning_peft.optim import (
    check_half_precision,
    check_optimizer_state,
    convert_optimizer,
    converted_state,
    in_live_order,
    loraplus_groups,
    names_of,
    repair,
    stepped_names,
)
from lightning_peft.storage.dtensor import is_sharded

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "LayerParameters",
    "finish_optimizers",
    "install_optimizer_setup",
    "layers_of",
    "optimizer_entry",
    "prepare_optimizer_states",
]

Step = Callable[["pl.Trainer"], None]
#: Weak references to the parameters of each layer, by its name.
LayerParameters = dict[str, list["weakref.ref[nn.Parameter]"]]


class OptimizerSetup:
    """Runs our steps before and after the strategy creates its optimizers, and loads their states.

    Its bound methods `run` and `load` are instance attributes of the strategy. Lightning calls
    `setup_optimizers` before the precision plugin, the learning-rate finder and the restored state
    see the optimizers; `on_fit_start` would be too late.

    Attributes:
        steps: What to run before and after, by the id of the callback that asked.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.original = strategy.setup_optimizers
        self.original_load = strategy.load_optimizer_state_dict
        self.trainer: pl.Trainer | None = None
        self.steps: dict[int, tuple[Step, Step]] = {}

    def run(self, trainer: pl.Trainer) -> None:
        """Called when the strategy is to create its optimizers."""
        self.trainer = trainer
        for before, _ in self.steps.values():
            before(trainer)
        self.original(trainer)
        for _, after in self.steps.values():
            after(trainer)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Called when the strategy is to load optimizer states: checks and converts them first.

        All `on_fit_start` hooks are over by then. Other callbacks add groups in them.
        """
        if self.trainer is not None:
            prepare_optimizer_states(self.trainer, checkpoint)
        self.original_load(checkpoint)


def install_optimizer_setup(strategy: Strategy, owner: object, begin: Step, finish: Step) -> None:
    """Call `begin` before and `finish` after the strategy creates its optimizers, in every fit.

    A second call for the same owner replaces the first.
    """
    setup = getattr(strategy.setup_optimizers, "__self__", None)
    if not isinstance(setup, OptimizerSetup):
        setup = OptimizerSetup(strategy)
        object.__setattr__(strategy, "setup_optimizers", setup.run)
        object.__setattr__(strategy, "load_optimizer_state_dict", setup.load)
    setup.steps[id(owner)] = begin, finish


def layers_of(root: nn.Module, prefix: str) -> LayerParameters:
    """Weak references to every module's own parameters, by name: an early optimizer holds them."""
    return {
        f"{prefix}.{name}".strip("."): [weakref.ref(p) for p in module.parameters(recurse=False)]
        for name, module in root.named_modules()
    }


def finish_optimizers(
    module: nn.Module,
    strategy: Strategy,
    layers: LayerParameters,
    name: str | None,
) -> None:
    """Repair optimizers that were built before the adapters, check them, swap their class if asked.

    Args:
        module: The LightningModule.
        strategy: Holds the optimizers and their proxies.
        layers: What `layers_of` saw before anything was attached.
        name: Name of the optimizer that replaces the user's.

    Raises:
        RuntimeError: a trained parameter is in no optimizer (`configure_optimizers` may have
            returned None) or in several.
        ValueError: half-precision parameters under an epsilon that is zero in their dtype.
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
    for optimizer in optimizers:
        check_half_precision(optimizer)
    strategy.optimizers = optimizers  # makes Lightning's proxies again: they carry the class's name


def optimizer_names(trainer: pl.Trainer) -> list[list[list[str]]]:
    """Names of the parameters of every optimizer, by group."""
    named = dict(trainer.lightning_module.named_parameters())
    return [names_of(optimizer, named) for optimizer in trainer.strategy.optimizers]


def optimizer_entry(trainer: pl.Trainer) -> dict[str, Any]:
    """What a checkpoint says of its optimizer states: names by group, and names with a state."""
    named = dict(trainer.lightning_module.named_parameters())
    stepped = [stepped_names(optimizer, named) for optimizer in trainer.strategy.optimizers]
    classes = [_class_name(optimizer) for optimizer in trainer.strategy.optimizers]
    return {"optimizers": optimizer_names(trainer), "stepped": stepped, "classes": classes}


def _class_name(optimizer: Optimizer) -> str:
    """Name of the optimizer's class; Lightning's and our subclasses keep the name they replace."""
    return (
        type(optimizer)
        .__name__.removeprefix("Lightning")
        .removeprefix("Paged")
        .removesuffix("8bit")
    )


def _warn_of_other_classes(saved: object, optimizers: Sequence[Optimizer]) -> None:
    """Warn if a state is continued by another class, whose step reads it differently."""
    live = [_class_name(optimizer) for optimizer in optimizers]
    if isinstance(saved, list) and len(saved) == len(live) and saved != live:
        warnings.warn(
            f"PEFT: the checkpoint was trained with {saved}, and configure_optimizers returns "
            f"{live}; the state is continued as it is. Return the former class to resume exactly",
            stacklevel=3,
        )


def prepare_optimizer_states(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Number, check and convert the optimizer states of a checkpoint for the live optimizers.

    The states change in place. Files without names (of other code) keep the order they have.

    Raises:
        ValueError: another set of parameters, or groups; states that do not fit; with the names.
    """
    states = checkpoint.get("optimizer_states")
    if states is None:
        return
    ours = checkpoint.get(KEY) or {}
    optimizers, live = trainer.strategy.optimizers, optimizer_names(trainer)
    if not isinstance(states, list) or len(states) != len(optimizers):
        count = len(states) if isinstance(states, list) else 0
        raise ValueError(
            f"optimizer states: expected {count} optimizers, as in the checkpoint, got "
            f"{len(live)} from configure_optimizers"
        )
    named = dict(trainer.lightning_module.named_parameters())
    sharded = any(is_sharded(p) for p in named.values())
    saved, stepped = ours.get("optimizers"), ours.get("stepped") or [[]] * len(states)
    if saved:
        _check_names(saved, stepped, states)
        states = [
            in_live_order(state, then, now, f"state of optimizer {i}")
            for i, (state, then, now) in enumerate(zip(states, saved, live, strict=True))
        ]
        checkpoint[KEY] = {**ours, "optimizers": live}
    prepared = []
    for i, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        what = f"state of optimizer {i}"
        check_optimizer_state(optimizer, state, named, what, stepped=stepped[i], sharded=sharded)
        changed = converted_state(optimizer, state)
        if changed.get("state") is not state.get("state") and trainer.is_global_zero:
            warnings.warn(
                f"state of optimizer {i}: converted from 8 bit to {type(optimizer).__name__}; give "
                "PEFT the optimizer= of the first run to go on in 8 bit",
                stacklevel=2,
            )
        prepared.append(changed)
    if trainer.is_global_zero:
        _warn_of_other_classes(ours.get("classes"), optimizers)
    checkpoint["optimizer_states"] = prepared
    _check_schedulers(trainer, checkpoint)


def _check_schedulers(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError if a scheduler's state has another form than the live one."""
    states = checkpoint.get("lr_schedulers") or []
    configs = trainer.strategy.lr_scheduler_configs
    versions = (checkpoint.get(KEY) or {}).get("versions")
    same = isinstance(versions, dict) and versions.get("torch") == torch.__version__
    for i, (config, state) in enumerate(zip(configs, states, strict=False)):
        live = config.scheduler.state_dict()
        check_like(state, live, "checkpoint", f"lr_schedulers[{i}]", complete=same)


def _check_names(saved: Any, stepped: list[Any], states: list[Any]) -> None:
    """Raise ValueError unless names and states belong together."""
    try:
        sizes = [[len(group["params"]) for group in state["param_groups"]] for state in states]
        fits = [[len(group) for group in each] for each in saved] == sizes
        fits = fits and len(stepped) == len(states)
    except (TypeError, LookupError, AttributeError):
        fits = False
    if not fits or not all(isinstance(n, str) for each in saved for group in each for n in group):
        raise ValueError(
            "optimizer states: expected a name per parameter of every group, got others; the file "
            "is malformed: resume from another checkpoint"
        )


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
