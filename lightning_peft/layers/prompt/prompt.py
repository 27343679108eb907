"""The positions that the active prompts put before the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.layers.mixed_batch import MixedBatch, current_mixed_batch
from lightning_peft.layers.prompt.adapter import PromptAdapter

__all__ = ["Prompt", "prompt_of"]


@dataclass
class Prompt:
    """Positions before the text.

    Attributes:
        values: Vectors of the positions, [B, n, features].
        mask: Which positions each row has, [B, n] of 0 and 1; None if every row has all.
    """

    values: Tensor
    mask: Tensor | None

    @property
    def n(self) -> int:
        """Positions of the longest row."""
        return self.values.shape[1]

    def ones(self, like: Tensor) -> Tensor:
        """Return the mask in the dtype and on the device of another."""
        if self.mask is None:
            return like.new_ones(self.values.shape[:2])
        return self.mask.to(like)

    def counts(self) -> int | Tensor:
        """Return the positions per row: n, or [B, 1]."""
        return self.n if self.mask is None else self.mask.sum(dim=1, keepdim=True)


def prompt_of(adapters: Sequence[PromptAdapter], batch: int, device: torch.device) -> Prompt | None:
    """Return the positions of every row, those of the adapter named last in front."""
    if not adapters:
        return None
    mix = current_mixed_batch()
    tables = {id(a): a.prompts(batch).to(device) for a in adapters}
    if mix is None:
        return Prompt(_joined([tables[id(a)] for a in reversed(adapters)], batch), None)
    return _mixed_prompt(adapters, tables, mix, batch, device)


def _joined(tables: Sequence[Tensor], batch: int) -> Tensor:
    """Return the positions of several tables [n, features] or [batch, n, features], per row."""
    return torch.cat([t.expand(batch, -1, -1) for t in tables], dim=1)


def _mixed_prompt(
    adapters: Sequence[PromptAdapter],
    tables: Mapping[int, Tensor],
    mix: MixedBatch,
    batch: int,
    device: torch.device,
) -> Prompt | None:
    """Return the prompts of a mixed batch, padded on the left to the longest one."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(mix.names):
        own = [tables[id(a)] for a in reversed(adapters) if a.adapter_name == name]
        if own:
            found[name] = _joined(own, batch)
    if not found:
        return None
    n = max(t.shape[1] for t in found.values())
    # Of the names, not of the mask: the host would wait for the device.
    is_full = all(name in found and found[name].shape[1] == n for name in mix.names)
    like = next(iter(found.values()))
    values = like.new_zeros(batch, n, like.shape[2])
    mask = torch.zeros(batch, n, dtype=torch.int64, device=device)
    for name, table in found.items():
        rows = mix.index(name, batch, device)
        short = n - table.shape[1]
        padded = torch.cat([table.new_zeros(batch, short, table.shape[2]), table], dim=1)
        values = values.index_copy(0, rows, padded[rows])
        mask[:, short:].index_fill_(0, rows, 1)
    return Prompt(values, None if is_full else mask)
