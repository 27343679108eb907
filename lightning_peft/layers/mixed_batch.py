"""Mixed batches: every row of a batch runs under its own adapter.

The mix in force belongs to a context (`contextvars`), so each thread and each asyncio task has its
own. Backward is different: activation checkpointing repeats a forward there, possibly in one of
autograd's threads and after the block has ended. A mixed batch therefore binds itself to the
tensors that autograd saves inside its block. A checkpointed function reads its saved inputs before
it is repeated, which puts the mix of the first run in force again, for the nodes of that run only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_peft.core.registry import AdapterRegistry
from lightning_peft.layers.gates import Gates

__all__ = [
    "BASE",
    "Choices",
    "Hooks",
    "MixedBatch",
    "any_mixed_batch",
    "batch_facts",
    "chosen_adapters",
    "current_choices",
    "current_facts",
    "current_gates",
    "current_mixed_batch",
    "hooks_in_force",
    "mixed_batch",
    "saves_for_recomputation",
    "without_mixed_batch",
]

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
        self.first_node = _next_node()
        self.last_node: int | None = None
        self.backward = _current_backward()
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
            rows = torch.tensor(
                [i for i, n in enumerate(self.names) if n == name], dtype=torch.int64
            )
            rows = (rows[:, None] * repeat + torch.arange(repeat)).reshape(-1)
            self._index[key] = rows.to(device)
        return self._index[key]


class _Recomputation(NamedTuple):
    """The mixed batches whose saved tensors a backward pass has read.

    Attributes:
        backward: Id of the backward pass.
        node: Sequence number of the last node that a recomputation made and that read; -1 before.
        batches: Mixed batches, the one read last first.
    """

    backward: int
    node: int
    batches: tuple[weakref.ref[MixedBatch], ...]


class _Saved(NamedTuple):
    """A tensor that autograd saved inside a block.

    Attributes:
        value: The tensor, as the hooks around the block packed it.
        version: The tensor's version; None if other hooks packed it.
        batch: The mix in force when it was saved.
        repeated: Whether a recomputation saved it, whose nodes are not numbered as the block's.
    """

    value: object
    version: int | None
    batch: MixedBatch | None
    repeated: bool


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


_current: ContextVar[MixedBatch | None] = ContextVar("mixed_batch", default=None)
_recomputation: ContextVar[_Recomputation | None] = ContextVar("recomputation", default=None)
_scopes = _Scopes()


def any_mixed_batch() -> bool:
    """Whether any thread may have a mixed batch or a choice of its own; False costs one call."""
    return _scopes.exist


def current_mixed_batch() -> MixedBatch | None:
    """Return the mix in force; None if all rows are under the acting adapters."""
    found = _in_force_here()
    return found if found is not None and found.names else None


def current_choices() -> Choices:
    """Return the adapters that this thread or task chose, by registry; usually empty."""
    found = _in_force_here()
    return () if found is None else found.choices


def current_facts() -> Mapping[str, Tensor]:
    """Return what is known about the samples of the batch; usually empty."""
    found = _in_force_here()
    return {} if found is None else found.facts


def current_gates() -> Gates | None:
    """Return the factors on adapters that a router found; usually None."""
    found = _in_force_here()
    return None if found is None else found.gates


def _in_force_here() -> MixedBatch | None:
    if not _scopes.exist:
        return None
    return _find_outside_graph() if torch.compiler.is_compiling() else _find()


def _find() -> MixedBatch | None:
    current, backward = _current.get(), _current_backward()
    if backward < 0:
        return current
    node, read = _current_node(), _recomputation.get()
    if read is not None and read.backward == backward:
        for reference in read.batches:
            batch = reference()
            if batch is not None and (node == read.node >= 0 or batch.contains_node(node)):
                return batch
    if current is None or current.backward == backward or current.contains_node(node):
        return current
    return None  # repeats a forward from before the block


_find_outside_graph: Callable[[], MixedBatch | None] = torch.compiler.disable(
    _find, reason="a mixed batch belongs to a thread or task"
)


def _next_node() -> int:
    """Return the number of the next node of the graph, in the order of the forward."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def _current_backward() -> int:
    return torch._C._current_graph_task_id()


def _current_node() -> int:
    node = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr()


@contextmanager
def without_mixed_batch() -> Iterator[None]:
    """Suspend the mix, for rows that are all under one name already. A choice stays."""
    found = _find()
    rest = None if found is None or not found.choices else MixedBatch((), found.choices)
    with _in_force(rest):
        yield


@contextmanager
def _in_force(batch: MixedBatch | None) -> Iterator[None]:
    current, recomputation = _current.set(batch), _recomputation.set(None)
    try:
        yield
    finally:
        _recomputation.reset(recomputation)
        _current.reset(current)


@contextmanager
def mixed_batch(names: Sequence[str]) -> Iterator[None]:
    """Put a mix in force in this thread or task, and for the backward of what runs inside."""
    outer = _current.get() or MixedBatch(())
    with _block(MixedBatch(names, outer.choices, outer.facts, outer.gates)):
        yield


@contextmanager
def batch_facts(facts: Mapping[str, Tensor]) -> Iterator[None]:
    """Let changes read these facts in this thread or task, and in the backward of what runs inside.

    Args:
        facts: By name; rows are the samples of the batch.
    """
    outer = _current.get() or MixedBatch(())
    with _block(MixedBatch(outer.names, outer.choices, {**outer.facts, **facts}, outer.gates)):
        yield


@contextmanager
def chosen_adapters(choices: Choices, gates: Gates | None = None) -> Iterator[None]:
    """Let these adapters act in this thread or task, and in the backward of what runs inside.

    Args:
        choices: Names by registry; other registries keep an outer choice, or the default.
        gates: Factors on them; None keeps those of an outer block.
    """
    outer = _current.get() or MixedBatch(())
    chosen = {id(registry) for registry, _ in choices}
    choices = (*choices, *(pair for pair in outer.choices if id(pair[0]) not in chosen))
    with _block(MixedBatch(outer.names, choices, outer.facts, gates or outer.gates)):
        yield


@contextmanager
def _block(batch: MixedBatch) -> Iterator[None]:
    batch.outer_hooks = _outer_hooks()
    close = _scopes.open(batch, ("block", id(batch)))
    with _in_force(batch), saved_tensors_hooks(_pack, _unpack):
        try:
            yield
        finally:
            batch.last_node = _next_node()
            close()
    batch.check()


# ---- tensors saved inside a block


def hooks_in_force() -> Hooks | None:
    """Return the hooks for saved tensors that the innermost context put in force."""
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def saves_for_recomputation(hooks: Hooks | None) -> bool:
    """Return whether hooks for saved tensors are others than those of a mixed batch."""
    return hooks is not None and hooks[0] is not _pack


def _outer_hooks() -> Hooks | None:
    """Return the hooks in force; those around the enclosing block if there is one."""
    hooks = hooks_in_force()
    if hooks is None or hooks[0] is not _pack:
        return hooks
    enclosing = _current.get()
    return None if enclosing is None else enclosing.outer_hooks


def _pack(tensor: Tensor) -> _Saved:
    batch, repeated = _find(), _current_backward() >= 0
    if batch is None or batch.outer_hooks is None:
        return _Saved(tensor, tensor._version, batch, repeated)
    return _Saved(batch.outer_hooks[0](tensor), None, batch, repeated)


def _unpack(saved: _Saved) -> Tensor:
    value, version, batch, repeated = saved
    if isinstance(value, Tensor) and version is not None and value._version != version:
        raise RuntimeError(
            f"backward: expected a tensor {list(value.shape)} at version {version}, got version "
            f"{value._version}: an in-place operation modified it after autograd saved it; use the "
            "operation out of place"
        )
    if batch is not None:
        _note_read(batch, repeated)
        if version is None and batch.outer_hooks is not None:
            return batch.outer_hooks[1](value)
    assert isinstance(value, Tensor)
    return value


def _note_read(batch: MixedBatch, repeated: bool) -> None:
    """Put a batch in force for what its autograd nodes repeat."""
    backward, read = _current_backward(), _recomputation.get()
    if backward < 0:
        return
    others = () if read is None or read.backward != backward else read.batches
    if others and others[0]() is batch and not repeated:
        return  # the usual case, once per saved tensor
    scope = ("backward", backward)
    if not _scopes.is_open(scope):
        close = _scopes.open(batch, scope)
        torch.autograd.Variable._execution_engine.queue_callback(close)
    kept = tuple(r for r in others if r() is not batch)
    node = _current_node() if repeated else -1
    _recomputation.set(_Recomputation(backward, node, (weakref.ref(batch), *kept)))
