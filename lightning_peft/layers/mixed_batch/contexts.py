"""The blocks that put a mix, a choice of adapters or facts in force."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_peft.layers.gates import Gates
from lightning_peft.layers.mixed_batch.autograd_nodes import next_node
from lightning_peft.layers.mixed_batch.batch import Choices, MixedBatch
from lightning_peft.layers.mixed_batch.in_force import CURRENT, find_batch, in_force, scopes
from lightning_peft.layers.mixed_batch.saved_tensors import outer_hooks, pack, unpack

__all__ = ["batch_facts", "chosen_adapters", "mixed_batch", "without_mixed_batch"]


@contextmanager
def mixed_batch(names: Sequence[str]) -> Iterator[None]:
    """Put a mix in force in this thread or task, and for the backward of what runs inside."""
    outer = CURRENT.get() or MixedBatch(())
    with _block(MixedBatch(names, outer.choices, outer.facts, outer.gates)):
        yield


@contextmanager
def batch_facts(facts: Mapping[str, Tensor]) -> Iterator[None]:
    """Let changes read these facts in this thread or task, and in the backward of what runs inside.

    Args:
        facts: By name; rows are the samples of the batch.
    """
    outer = CURRENT.get() or MixedBatch(())
    with _block(MixedBatch(outer.names, outer.choices, {**outer.facts, **facts}, outer.gates)):
        yield


@contextmanager
def chosen_adapters(choices: Choices, gates: Gates | None = None) -> Iterator[None]:
    """Let these adapters act in this thread or task, and in the backward of what runs inside.

    Args:
        choices: Names by registry; other registries keep an outer choice, or the default.
        gates: Factors on them; None keeps those of an outer block.
    """
    outer = CURRENT.get() or MixedBatch(())
    chosen = {id(registry) for registry, _ in choices}
    choices = (*choices, *(pair for pair in outer.choices if id(pair[0]) not in chosen))
    with _block(MixedBatch(outer.names, choices, outer.facts, gates or outer.gates)):
        yield


@contextmanager
def without_mixed_batch() -> Iterator[None]:
    """Suspend the mix, for rows that are all under one name already. A choice stays."""
    found = find_batch()
    rest = None if found is None or not found.choices else MixedBatch((), found.choices)
    with in_force(rest):
        yield


@contextmanager
def _block(batch: MixedBatch) -> Iterator[None]:
    batch.outer_hooks = outer_hooks()
    close = scopes.open(batch, ("block", id(batch)))
    with in_force(batch), saved_tensors_hooks(pack, unpack):
        try:
            yield
        finally:
            batch.last_node = next_node()
            close()
    batch.check()
