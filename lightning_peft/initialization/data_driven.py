"""Initialisation from batches: EVA and CorDA from layers' inputs, LoRA-GA from weight gradients.

Such an adapter is attached with a default initialisation and waits for data. Create the optimizer
after the initialisation, because EVA moves ranks between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.initialization.incremental_pca import seeded
from lightning_peft.initialization.input_covariances import input_covariances
from lightning_peft.initialization.input_directions import input_directions
from lightning_peft.initialization.restore import load_tensors, store_residual
from lightning_peft.initialization.weight_gradients import weight_gradients
from lightning_peft.layers.adapted import adapted_modules, weight_adapters_of
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import InitData
from lightning_peft.models.modules import evaluating
from lightning_peft.models.outputs import run_on

__all__ = ["start_from_data", "waiting_adapters"]

Step = Callable[[Any], Any]
_Finder = Callable[
    [Sequence[WeightAdapter], Sequence[Any], Step], Iterable[tuple[Tensor, Tensor | None]]
]

_FINDERS: dict[InitData, _Finder] = {
    InitData.INPUTS: input_directions,
    InitData.GRADIENTS: weight_gradients,
    InitData.COVARIANCE: input_covariances,
}


def waiting_adapters(model: nn.Module) -> list[WeightAdapter]:
    """Adapters that still wait for their initialisation from data."""
    return [a for _, m in adapted_modules(model) for a in weight_adapters_of(m) if a.awaits_data]


def start_from_data(model: nn.Module, batches: Iterable[Any], step: Step | None = None) -> None:
    """Initialise every waiting adapter from batches; the output of the model does not change.

    Call it before the optimizer is created. The model runs in eval mode with its other adapters
    active. Gradients and the random state are as before afterwards.

    Args:
        model: A model with adapters attached, on the device where it will run.
        batches: Batches on that device. The method's ``batches`` says how many are taken; EVA
            repeats them until its directions settle.
        step: Function that runs the model on a batch and returns the loss (a tensor, or an object
            with one under ``loss``). Default: the model on the batch, mappings as keywords.

    Raises:
        ValueError: no batches, a layer that did not run or got no gradient, too few rows, or
            several active adapters on a base that would change.
    """
    waiting = waiting_adapters(model)
    run = step or (lambda batch: run_on(model, batch))
    most = max((int(a.method.data_options["batches"]) for a in waiting), default=0)
    taken = list(islice(batches, most)) if waiting else []
    if waiting and not taken:
        raise ValueError("start_from_data: expected at least one batch, got none")
    groups: dict[tuple[str, int], list[WeightAdapter]] = {}
    for adapter in waiting:
        groups.setdefault((adapter.adapter_name, id(adapter.method)), []).append(adapter)
    for adapters in groups.values():
        method = adapters[0].method
        mine = taken[: int(method.data_options["batches"])]
        find = _FINDERS[method.needs_data]
        for adapter in adapters if method.needs_data.moves_base else ():
            _check_one_base(adapter)
        with _undisturbed(model):
            found = find(adapters, mine, run)
        for adapter, (what, singular_values) in zip(adapters, found, strict=True):
            _initialize(adapter, what, singular_values)


def _check_one_base(adapter: WeightAdapter) -> None:
    """Raise ValueError if another adapter acts on a base that the initialisation will change."""
    site = adapter.site
    others = {a.adapter_name for a in adapter.state.active.edits} - {adapter.adapter_name}
    if others and site.storage.label == "dense":
        raise ValueError(
            f"{site.quoted}: expected one adapter at a time where an initialisation changes the "
            f"base, got {sorted({adapter.adapter_name, *others})}; activate one"
        )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without training, then restore modes, flags and random state."""
    flags = {p: p.requires_grad for p in model.parameters()}
    cuda = {p.device for p in flags if p.device.type == "cuda"}
    with torch.random.fork_rng(list(cuda)), evaluating(model):
        try:
            for p in flags:
                p.requires_grad_(False)
            yield
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)


def _initialize(adapter: WeightAdapter, found: Tensor, singular_values: Tensor | None) -> None:
    values = dict(adapter.tensors())
    with torch.no_grad(), seeded(found.device):
        adapter.method.from_data(values, adapter.site, found.float(), singular_values)
    load_tensors(adapter, values)
    store_residual(adapter)
    adapter.awaits_data = False
