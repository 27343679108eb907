"""Principal directions of layers' inputs, for EVA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from lightning_peft.initialization.incremental_pca import IncrementalPCA, share_ranks
from lightning_peft.initialization.layer_inputs import attended, input_owners, watch_input
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["input_directions"]

_MOST_PASSES = 1000


@torch.no_grad()
def input_directions(
    adapters: Sequence[WeightAdapter], batches: Sequence[Any], run: Callable[[Any], Any]
) -> list[tuple[Tensor, Tensor]]:
    """(directions [k, in], singular values [k]) of every adapter's input.

    Layers with one input share their directions. The ranks k share the budget of all adapters.

    Args:
        adapters: Adapters of one method.
        batches: Batches; repeated until the directions settle.
        run: Runs the model on a batch.

    Raises:
        ValueError: a layer did not run, or no batch has enough rows.
    """
    options, named = adapters[0].method.data_options, {a.site.label: a for a in adapters}
    masks = [attended(batch, options) for batch in batches]
    owner = input_owners(named, batches[0], masks[0], run)
    largest = _largest_ranks(named, owner, float(options["rho"]))
    found = {
        own: IncrementalPCA(largest[own], float(options["tau"]))
        for own in dict.fromkeys(owner.values())
    }
    budget = sum(a.method.rank(a.site) for a in adapters)
    ranks, turning = dict(largest), list(found)
    for done, (batch, mask) in enumerate(cycle(zip(batches, masks, strict=True))):
        turning = [n for n, pca in found.items() if not bool(pca.settled[: ranks[n]].all())]
        if not turning or done >= _MOST_PASSES:
            break
        _add_batch({n: (named[n], found[n]) for n in turning}, batch, mask, run)
        if done + 1 == len(batches):
            _require_found(found)
        if all(pca.components is not None for pca in found.values()):
            ranks = share_ranks(found, owner, largest, budget)
    if turning:
        warnings.warn(
            f"init='eva': the directions of {len(turning)} layers still turned after "
            f"{_MOST_PASSES} passes ({turning[:3]}); they are taken as they are. Lower tau, or "
            "give more batches",
            stacklevel=4,
        )
    return [found[owner[name]].leading(ranks[name]) for name in named]


def _add_batch(
    turning: Mapping[str, tuple[WeightAdapter, IncrementalPCA]],
    batch: object,
    mask: Tensor | None,
    run: Callable[[Any], Any],
) -> None:
    """Add the inputs of one batch to the layers whose directions still turn."""
    with ExitStack() as stack:
        for adapter, pca in turning.values():
            watch_input(stack, adapter, pca.add, mask)
        run(batch)


def _largest_ranks(
    named: Mapping[str, WeightAdapter], owner: Mapping[str, str], rho: float
) -> dict[str, int]:
    """Layer → largest rank; layers with one input get the largest among them."""
    own = {name: _largest_rank(adapter, rho) for name, adapter in named.items()}
    shared: dict[str, int] = {}
    for name, first in owner.items():
        shared[first] = max(shared.get(first, 0), own[name])
    return {name: shared[owner[name]] for name in named}


def _largest_rank(adapter: WeightAdapter, rho: float) -> int:
    wanted = round(adapter.method.rank(adapter.site) * rho)
    return min(wanted, adapter.site.out_features, adapter.site.in_features)


def _require_found(found: Mapping[str, IncrementalPCA]) -> None:
    for name, pca in found.items():
        if pca.components is None:
            raise ValueError(
                f"init='eva': {name!r}: expected a batch with at least {pca.count} rows (r · rho), "
                "found none; give larger batches, or lower r or rho"
            )
