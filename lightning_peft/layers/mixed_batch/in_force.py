"""Which mixed batch is in force here: in this thread or task, and in a backward pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.layers.gates import Gates
from lightning_peft.layers.mixed_batch.autograd_nodes import current_backward, current_node
from lightning_peft.layers.mixed_batch.batch import Choices, MixedBatch

__all__ = [
    "CURRENT",
    "RECOMPUTATION",
    "Recomputation",
    "any_mixed_batch",
    "current_choices",
    "current_facts",
    "current_gates",
    "current_mixed_batch",
    "find_batch",
    "in_force",
    "scopes",
]


class Recomputation(NamedTuple):
    """The mixed batches whose saved tensors a backward pass has read.

    Attributes:
        backward: Id of the backward pass.
        node: Sequence number of the last node that a recomputation made and that read; -1 before.
        batches: Mixed batches, the one read last first.
    """

    backward: int
    node: int
    batches: tuple[weakref.ref[MixedBatch], ...]


class _Scopes:
    """The places, in all threads, where a layer may have to find a mixed batch.

    These are open blocks, and backward passes that have read tensors saved in a block. A cache of
    one answer: without any, layers need not look up the context. `torch.compile` guards on
    `exist`, and cannot trace a context variable.
    """

    def __init__(self) -> None:
        self.exist = False
        self._open: set[object] = set()
        self._lock = threading.RLock()  # garbage collection may close a scope while one opens

    def open(self, batch: MixedBatch, scope: object) -> Callable[[], None]:
        """Open a scope; return the function that closes it. It closes with its batch at last."""
        with self._lock:
            self._open.add(scope)
            self.exist = True
        close = weakref.finalize(batch, self._close, scope)
        close.atexit = False
        return close

    def is_open(self, scope: object) -> bool:
        """Return whether a scope is open."""
        return scope in self._open

    def _close(self, scope: object) -> None:
        with self._lock:
            self._open.discard(scope)
            if not self._open:
                self.exist = False


CURRENT: ContextVar[MixedBatch | None] = ContextVar("mixed_batch", default=None)
RECOMPUTATION: ContextVar[Recomputation | None] = ContextVar("recomputation", default=None)
scopes = _Scopes()


def any_mixed_batch() -> bool:
    """Whether any thread may have a mixed batch or a choice of its own; False costs one call."""
    return scopes.exist


def current_mixed_batch() -> MixedBatch | None:
    """Return the mix in force; None if all rows are under the acting adapters."""
    found = _in_force_here() if scopes.exist else None
    return found if found is not None and found.names else None


def current_choices() -> Choices:
    """Return the adapters that this thread or task chose, by registry; usually empty."""
    found = _in_force_here() if scopes.exist else None
    return () if found is None else found.choices


def current_facts() -> Mapping[str, Tensor]:
    """Return what is known about the samples of the batch; usually empty."""
    found = _in_force_here() if scopes.exist else None
    return {} if found is None else found.facts


def current_gates() -> Gates | None:
    """Return the factors on adapters that a router found; usually None."""
    found = _in_force_here() if scopes.exist else None
    return None if found is None else found.gates


def _in_force_here() -> MixedBatch | None:
    return _find_outside_graph() if torch.compiler.is_compiling() else find_batch()


def find_batch() -> MixedBatch | None:
    """Return the mix in force, also where backward repeats a forward of its block."""
    current, backward = CURRENT.get(), current_backward()
    if backward < 0:
        return current
    node, read = current_node(), RECOMPUTATION.get()
    if read is not None and read.backward == backward:
        for reference in read.batches:
            batch = reference()
            if batch is not None and (node == read.node >= 0 or batch.contains_node(node)):
                return batch
    if current is None or current.backward == backward or current.contains_node(node):
        return current
    return None  # repeats a forward from before the block


_find_outside_graph: Callable[[], MixedBatch | None] = torch.compiler.disable(
    find_batch, reason="a mixed batch belongs to a thread or task"
)


@contextmanager
def in_force(batch: MixedBatch | None) -> Iterator[None]:
    """Put a mix in force in this thread or task."""
    batch_token, read_token = CURRENT.set(batch), RECOMPUTATION.set(None)
    try:
        yield
    finally:
        RECOMPUTATION.reset(read_token)
        CURRENT.reset(batch_token)
