"""Rows of one batch under different adapters: which rows belong to which name, seen by every
adapted layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["BASE", "MixedBatch", "current_mixed_batch", "mixed_batch", "without_mixed_batch"]

BASE = "__base__"  # a row under no adapter, as Hugging Face peft spells it


class MixedBatch:
    """One adapter name a sample; index tensors are made once per (batch size, device)."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.active: set[str] | None = None  # in the layers that ran; None: none ran
        self._index: dict[tuple[str, int, torch.device], Tensor] = {}

    def through(self, active: Iterable[str]) -> None:
        """Note that an adapted layer runs, with these adapters active."""
        self.active = {*(self.active or ()), *active}

    def check(self) -> None:
        """After the last forward.

        Raises:
            ValueError: rows named an adapter that no layer had active: they ran as the base.
        """
        if self.active is None:
            return
        unknown = sorted({*self.names} - self.active - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names: expected active adapters, one of {sorted(self.active)} or "
                f"{BASE!r}, got {', '.join(map(repr, unknown))}, whose rows ran as the base; call "
                f"set_adapter(model, [...]) with every name of the batch first"
            )

    def index(self, name: str, n_rows: int, device: torch.device) -> Tensor:
        """Rows [k] int64 of `name` in a tensor with `n_rows` leading rows.

        A layer may see each sample several times in a row: tokens flattened into the batch, beams.
        Batch-major order is assumed, which is what Hugging Face models use.

        Raises:
            ValueError: `n_rows` is no multiple of the number of names.
        """
        key = (name, n_rows, device)
        if key not in self._index:
            if n_rows % len(self.names):
                raise ValueError(
                    f"adapter_names: expected a batch of {len(self.names)} rows (or a multiple, "
                    f"batch-major), got {n_rows}; give one adapter name per sample"
                )
            repeat = n_rows // len(self.names)
            rows = torch.tensor(
                [i for i, n in enumerate(self.names) if n == name], dtype=torch.int64
            )
            rows = (rows[:, None] * repeat + torch.arange(repeat)).reshape(-1)
            self._index[key] = rows.to(device)
        return self._index[key]


_current: list[MixedBatch | None] = [None]


def current_mixed_batch() -> MixedBatch | None:
    """The mix in force, or None: all rows under the active adapters."""
    return _current[0]


@contextmanager
def without_mixed_batch() -> Iterator[None]:
    """Suspend the mix: the rows at hand are all under one name already."""
    before = _current[0]
    _current[0] = None
    try:
        yield
    finally:
        _current[0] = before


@contextmanager
def mixed_batch(names: Sequence[str]) -> Iterator[None]:
    """Put a mix in force; keep backward inside too when activations are recomputed."""
    before, mix = _current[0], MixedBatch(names)
    _current[0] = mix
    try:
        yield
    finally:
        _current[0] = before
    mix.check()
