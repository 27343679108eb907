"""Binds a mixed batch to the tensors that autograd saves in its block, for recomputation."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.layers.mixed_batch.autograd_nodes import current_backward, current_node
from lightning_peft.layers.mixed_batch.batch import Hooks, MixedBatch
from lightning_peft.layers.mixed_batch.in_force import (
    CURRENT,
    RECOMPUTATION,
    Recomputation,
    find_batch,
    scopes,
)

__all__ = ["hooks_in_force", "outer_hooks", "pack", "saves_for_recomputation", "unpack"]


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


def hooks_in_force() -> Hooks | None:
    """Return the hooks for saved tensors that the innermost context put in force."""
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def saves_for_recomputation(hooks: Hooks | None) -> bool:
    """Return whether hooks for saved tensors are others than those of a mixed batch."""
    return hooks is not None and hooks[0] is not pack


def outer_hooks() -> Hooks | None:
    """Return the hooks in force; those around the enclosing block if there is one."""
    hooks = hooks_in_force()
    if hooks is None or hooks[0] is not pack:
        return hooks
    enclosing = CURRENT.get()
    return None if enclosing is None else enclosing.outer_hooks


def pack(tensor: Tensor) -> _Saved:
    """Called when autograd saves a tensor."""
    batch, repeated = find_batch(), current_backward() >= 0
    if batch is None or batch.outer_hooks is None:
        return _Saved(tensor, tensor._version, batch, repeated)
    return _Saved(batch.outer_hooks[0](tensor), None, batch, repeated)


def unpack(saved: _Saved) -> Tensor:
    """Called when backward reads a saved tensor."""
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
    backward, read = current_backward(), RECOMPUTATION.get()
    if backward < 0:
        return
    others = () if read is None or read.backward != backward else read.batches
    if others and others[0]() is batch and not repeated:
        return  # the usual case, once per saved tensor
    scope = ("backward", backward)
    if not scopes.is_open(scope):
        close = scopes.open(batch, scope)
        torch.autograd.Variable._execution_engine.queue_callback(close)
    kept = tuple(r for r in others if r() is not batch)
    node = current_node() if repeated else -1
    RECOMPUTATION.set(Recomputation(backward, node, (weakref.ref(batch), *kept)))
