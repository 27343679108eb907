"""`MixedBatch`: the adapter name of every sample, and what else differs between samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from lightning_peft_kernels.optim.step_inputs import rows_on
from torch import Tensor

from lightning_peft.core.registry import AdapterRegistry
from lightning_peft.layers.gates import Gates
from lightning_peft.layers.mixed_batch.autograd_nodes import current_backward, next_node

__all__ = ["BASE", "Choices", "Hooks", "MixedBatch"]

BASE = "__base__"  # a row under no adapter, as Hugging Face peft spells it

#: Adapter names by the registry of the model that they are for.
Choices = tuple[tuple[AdapterRegistry, tuple[str, ...]], ...]

#: Hooks for saved tensors: pack and unpack.
Hooks = tuple[Callable[[Tensor], object], Callable[[object], Tensor]]


class MixedBatch:
    """The adapter name of every sample of a batch, and the adapters chosen for a block.

    Attributes:
        names: One adapter name per sample; empty if all rows are under the acting adapters.
        choices: The adapters that act instead of the default, by registry.
        facts: What changes read about the samples of the batch, [samples, …] each: task ids.
        gates: Factors on adapters that a router found; None without one.
        active: Adapters that were active in the layers that ran; None if no layer ran.
        first_node: Sequence number of the first autograd node made in the block.
        last_node: Sequence number behind the last one; None while the block is open.
        backward: Id of the backward pass that entered the block, -1 outside backward.
        outer_hooks: Hooks for saved tensors that were in force around the block.
    """

    def __init__(
        self,
        names: Sequence[str],
        choices: Choices = (),
        facts: Mapping[str, Tensor] = MappingProxyType({}),
        gates: Gates | None = None,
    ) -> None:
        self.names = tuple(names)
        self.choices = choices
        self.facts = facts
        self.gates = gates
        self.active: set[str] | None = None
        self.first_node = next_node()
        self.last_node: int | None = None
        self.backward = current_backward()
        self.outer_hooks: Hooks | None = None
        self._index: dict[tuple[str, int, torch.device], Tensor] = {}

    def note_layer(self, active: Iterable[str]) -> None:
        """Record that an adapted layer runs with these adapters active."""
        self.active = {*(self.active or ()), *active}

    def contains_node(self, number: int) -> bool:
        """Return whether an autograd node was made inside the block."""
        return self.first_node <= number and (self.last_node is None or number < self.last_node)

    def check(self) -> None:
        """Check the names after the last forward.

        Raises:
            ValueError: rows named an adapter that no layer had active, so they ran as the base.
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
        """Return the rows of `name`, [k] int64, in a tensor with `n_rows` leading rows.

        A layer may see each sample several times in a row: tokens flattened into the batch, beams.
        Batch-major order is assumed, as in Hugging Face models.

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
            named = [i for i, n in enumerate(self.names) if n == name]
            rows = [i * repeat + j for i in named for j in range(repeat)]
            self._index[key] = rows_on(device, rows, torch.int64)
        return self._index[key]
