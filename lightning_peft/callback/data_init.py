"""Starts from data inside a run: the first batches, through the module's own `training_step`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from lightning_peft.callback.weight_averaging import rebuild_averages
from lightning_peft.checkpoint.rng_state import restore_rng, rng_state
from lightning_peft.initialization.data_driven import start_from_data, waiting_adapters
from lightning_peft.trainers.packages import is_fitting, package_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities import CombinedLoader

__all__ = ["initialize_pending"]


def initialize_pending(trainer: pl.Trainer) -> None:
    """Start the adapters that wait for data; after a resume none does. Before the optimizers exist.

    Raises:
        RuntimeError: several processes, a strategy that shards, or manual optimization.
    """
    module = trainer.lightning_module
    if not is_fitting(trainer) or not waiting_adapters(module):
        return
    _check_run(trainer, module)
    package = package_of(trainer)
    assert package is not None  # `PEFT.setup` checked the Trainer
    device = trainer.strategy.root_device
    random = rng_state(device)
    try:
        trainer.fit_loop.setup_data()
        combined = package.submodule("utilities").CombinedLoader
        loader = combined(trainer.train_dataloader, "max_size_cycle")
        with _silent(module), _where_it_was(loader):
            start_from_data(module, _batches(trainer, loader), _step(trainer, module))
    finally:
        restore_rng(random, device)
    rebuild_averages(trainer, module)


def _check_run(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    reason = ""
    if trainer.world_size > 1:
        reason = f"one process, got {trainer.world_size}"
    elif trainer.strategy.restore_checkpoint_after_setup:
        reason = f"a strategy with the whole model, got {type(trainer.strategy).__name__}"
    elif not module.automatic_optimization:
        reason = "automatic optimization, got a training_step that steps by itself"
    if reason:
        raise RuntimeError(
            f"PEFT: to start an adapter from data, expected {reason}; before fit, attach(module, "
            "method) and start_from_data(module, batches, step) with the same batches "
            "everywhere"
        )


@contextmanager
def _where_it_was(loader: CombinedLoader) -> Iterator[None]:
    """Loaders that know their position are at the same one afterwards."""
    kept = [
        (each, copy.deepcopy(each.state_dict()))
        for each in loader.flattened
        if hasattr(each, "state_dict") and hasattr(each, "load_state_dict")
    ]
    try:
        yield
    finally:
        for each, state in kept:
            each.load_state_dict(state)


def _batches(trainer: pl.Trainer, loader: CombinedLoader) -> Iterator[Any]:
    """Batches of the train dataloaders on the device; the loop's own iterator is left alone."""
    for batch, _, _ in iter(loader):
        batch = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _step(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    numbers = count()
    takes_index = len(inspect.signature(module.training_step).parameters) > 1

    def step(batch: object) -> Any:
        args = (batch, next(numbers)) if takes_index else (batch,)
        with trainer.precision_plugin.train_step_context():
            return module.training_step(*args)

    return step


@contextmanager
def _silent(module: pl.LightningModule) -> Iterator[None]:
    """`self.log` and `self.log_dict` do nothing: no loop is there to take what they give."""
    names = [n for n in ("log", "log_dict") if n not in vars(module)]
    for name in names:
        vars(module)[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
