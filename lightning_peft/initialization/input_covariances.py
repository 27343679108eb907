"""Second moments of layers' inputs, for CorDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_peft.initialization.layer_inputs import attended, input_owners, watch_input
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["input_covariances"]


class _Moments:
    """Sums xᵀ x over the rows of every call, on the CPU, each call divided by its largest entry."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.calls = 0

    def add(self, x: Tensor) -> None:
        """Add one input [n, in]."""
        x = x.float()
        peak = x.max().abs()
        x = x / torch.where(peak > 0, peak, 1.0)
        moments = (x.mT @ x).cpu()
        self.sum = moments if self.sum is None else self.sum.add_(moments)
        self.calls += 1


@torch.no_grad()
def input_covariances(
    adapters: Sequence[WeightAdapter], batches: Sequence[Any], run: Callable[[Any], Any]
) -> Iterator[tuple[Tensor, None]]:
    """The mean second moments [in, in] of every adapter's input; layers with one input share them.

    Args:
        adapters: Adapters of one method.
        batches: Batches; each is used once. Positions that an attention mask leaves out of a text
            do not count.
        run: Runs the model on a batch.

    Raises:
        ValueError: a layer did not run.
    """
    options, named = adapters[0].method.data_options, {a.site.label: a for a in adapters}
    masks = [attended(batch, options) for batch in batches]
    owner = input_owners(named, batches[0], masks[0], run)
    found = {own: _Moments() for own in dict.fromkeys(owner.values())}
    for batch, mask in zip(batches, masks, strict=True):
        with ExitStack() as stack:
            for name, moments in found.items():
                watch_input(stack, named[name], moments.add, mask)
            run(batch)
    means = {name: m.sum / m.calls for name, m in found.items() if m.sum is not None}
    return ((means[owner[name]], None) for name in named)
