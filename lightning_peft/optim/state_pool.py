"""One buffer that holds the optimizer state of many parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning_peft_kernels.codebooks.eight_bit import ZERO_CODE
from lightning_peft_kernels.optim.adamw_8bit import BLOCK
from lightning_peft_kernels.optim.step_inputs import rows_on
from torch import Tensor

from lightning_peft.optim.paged_memory import allocate, prefetch
from lightning_peft.storage.dtensor import local

__all__ = ["Field", "StatePool", "local"]


@dataclass(frozen=True)
class Field:
    """One kind of state: one entry per `every` elements, flat or `shaped` like the parameter."""

    dtype: torch.dtype
    every: int = 1
    fill: int = 0
    shaped: bool = False


FIELDS_8BIT = {
    "state1": Field(torch.uint8, fill=ZERO_CODE[True]),
    "absmax1": Field(torch.float32, every=BLOCK),
    "state2": Field(torch.uint8, fill=ZERO_CODE[False]),
    "absmax2": Field(torch.float32, every=BLOCK),
}


class StatePool:
    """The state of parameters on one device. Each begins at a multiple of 256 elements.

    Attributes:
        fields: Pooled tensors by name.
        steps: Number of steps that each parameter took, fp32 [T].
        views: For each parameter, its part of every field.
    """

    def __init__(self, params: Sequence[Tensor], fields: Mapping[str, Field], paged: bool) -> None:
        shards = [local(p) for p in params]
        device = shards[0].device
        padded = [-(-shard.numel() // BLOCK) * BLOCK for shard in shards]
        total = sum(padded)
        self.starts = {p: sum(padded[:i]) for i, p in enumerate(params)}
        self.rows = {p: i for i, p in enumerate(params)}
        self.steps = torch.zeros(len(params), device=device)
        sizes = {name: total // f.every * f.dtype.itemsize for name, f in fields.items()}
        self.buffer = allocate(sum(sizes.values()), device, paged)
        self.managed = paged and device.type == "cuda" and self.buffer.numel() > 0
        self.fields: dict[str, Tensor] = {}
        offset = 0
        # Wide types come first, so that every field is aligned.
        for name, field in sorted(fields.items(), key=lambda item: -item[1].dtype.itemsize):
            view = self.buffer[offset : offset + sizes[name]].view(field.dtype)
            self.fields[name] = view.fill_(field.fill) if field.fill else view
            offset += sizes[name]
        self.views: dict[Tensor, dict[str, Tensor]] = {}
        for i, (p, shard) in enumerate(zip(params, shards, strict=True)):
            self.views[p] = {"step": self.steps[i]}
            for name, field in fields.items():
                first = self.starts[p] // field.every
                view = self.fields[name][first : first + -(-shard.numel() // field.every)]
                self.views[p][name] = view.view(shard.shape) if field.shaped else view

    def rows_of(self, params: Sequence[Tensor]) -> Tensor:
        """Return the rows of `params` in `steps`, on the device."""
        return rows_on(self.steps.device, [self.rows[p] for p in params], torch.int64)

    def fill(self, p: Tensor, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state into the part of `p`."""
        for name, view in self.views[p].items():
            view.copy_(state[name].reshape(view.shape))

    def prefetch(self) -> None:
        """Move managed memory to the device. Call it once per step."""
        if self.managed:
            prefetch(self.buffer)
