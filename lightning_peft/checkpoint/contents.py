"""What a checkpoint holds of an adapted model, and how it is read back: strictly, by structure.

A file holds the kept tensors (see `kept`) and, under `KEY`, plain data that says what they are and
which base they belong to. On reading, the rest is completed from the live model, so that every
strict load downstream passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.checkpoint.description import FORMAT, KEY, describe, is_attached
from lightning_peft.checkpoint.forms import (
    CheckpointForm,
    form_of,
    full_state,
    merged_checkpoint,
    refuse_merged,
    without_base,
)
from lightning_peft.checkpoint.kept import kept_base_tensors, kept_tensors, live_tensors
from lightning_peft.checkpoint.masked_weights import masked_as_stored
from lightning_peft.checkpoint.structure import check_structure
from lightning_peft.checkpoint.verification import verify
from lightning_peft.core.finite import is_finite
from lightning_peft.core.marker import marked
from lightning_peft.core.modules import unchanged_modules
from lightning_peft.core.names import in_adapter, strip_compile
from lightning_peft.initialization.restore import restore_initialized
from lightning_peft.models.history import not_finite_at_start, note_loaded, note_moved
from lightning_peft.storage.dtensor import fill_rows, is_sharded

__all__ = [
    "FORMAT",
    "KEY",
    "adapters_of_file",
    "complete_checkpoint",
    "complete_state",
    "describe",
    "filter_checkpoint",
    "filter_state",
    "is_attached",
    "leaks",
    "load_kept",
    "nonfinite_message",
    "verify",
]


def filter_state(
    model: nn.Module, kept: Mapping[str, Tensor], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The kept part of a full state dict of `model` (or of an average of it), by canonical key.

    A key that the state lacks (a user's own `state_dict` dropped it) is taken from the live model.

    Args:
        model: The live model.
        kept: Its `kept_tensors`.
        state: The full state dict.
    """
    canonical = {id(t): key for key, t in kept.items()}
    found: dict[str, Any] = {}
    for key, tensor in live_tensors(model).items():
        name = canonical.get(id(tensor))
        if name is not None and name not in found and key in state:
            found[name] = state[key]
    return {name: found.get(name, t).detach() for name, t in kept.items()}


def complete_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A full state dict of `model`: the base as it is, the rest from `state`, under every alias."""
    note_loaded(model, state)
    canonical = {id(t): key for key, t in kept_tensors(model).items()}
    full: dict[str, Any] = {}
    for key, tensor in live_tensors(model).items():
        name = canonical.get(id(tensor), strip_compile(key))
        value = state.get(name, tensor)
        full[key] = value.detach() if isinstance(value, Tensor) else value
    return full


def load_kept(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into the live model; under FSDP2, this rank's rows of them."""
    note_loaded(model, state)
    canonical = {id(t): key for key, t in kept_tensors(model).items()}
    with torch.no_grad():
        for key, tensor in live_tensors(model).items():
            name = canonical.get(id(tensor), strip_compile(key))
            if name in state:
                fill_rows(tensor, state[name])


# ---- the file as a whole


@unchanged_modules()
def filter_checkpoint(
    model: nn.Module, checkpoint: Mapping[str, Any], form: CheckpointForm = "adapters"
) -> dict[str, Any]:
    """The checkpoint in one of the forms, with our entry; without ``state_dict`` unchanged."""
    if "state_dict" not in checkpoint:
        return dict(checkpoint)
    if not any(
        is_sharded(p) for p in model.parameters()
    ):  # otherwise the strategy did it on every rank
        note_moved(model)
    base = kept_base_tensors(model)
    kept = {**trained_tensors(model), **base}
    entry = {**describe(model, base), **(checkpoint.get(KEY) or {})}
    if form == "merged":
        return merged_checkpoint(model, {**checkpoint, KEY: entry})
    written = _each_state(dict(checkpoint), lambda state: filter_state(model, kept, state))
    if form == "full":
        entry |= {"form": "full", "tensors": sorted(written["state_dict"])}
        written = _each_state(written, lambda state: full_state(model, state))
    else:
        written["state_dict"] = marked(written["state_dict"])
    written[KEY] = entry
    return written


def complete_checkpoint(
    model: nn.Module, checkpoint: dict[str, Any], source: str, *, resuming: bool = True
) -> dict[str, Any]:
    """Check a checkpoint against the model and add the base to every state dict in it.

    Args:
        model: The model with adapters attached.
        checkpoint: As it was read.
        source: Where from, for messages.
        resuming: Whether training goes on; then the base must be stored the same way.

    Raises:
        ValueError: no adapters in the file, another configuration, another base, tensors that do
            not fit.
    """
    if "state_dict" not in checkpoint:
        return checkpoint
    checkpoint = adapters_of_file(checkpoint, source)
    with masked_as_stored(model, checkpoint["state_dict"]):
        verify(model, checkpoint, source, resuming=resuming)
    # Next to an average the file has the weights themselves; the average only rounds the start.
    restore_initialized(model, checkpoint.get("current_model_state", checkpoint["state_dict"]))
    return _each_state(dict(checkpoint), lambda state: complete_state(model, state))


def adapters_of_file(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """Check the structure of a file and return it in the form that holds adapters alone.

    Raises:
        ValueError: damaged entries, or merged weights.
    """
    check_structure(checkpoint, source)
    refuse_merged(checkpoint, source)
    if form_of(checkpoint) != "full":
        return checkpoint
    return _each_state(dict(checkpoint), lambda state: without_base(checkpoint, state))


def _each_state(
    checkpoint: dict[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Apply `change` to the weights and to the copies that averaging callbacks put beside them."""
    for key in ("state_dict", "current_model_state"):
        if key in checkpoint:
            checkpoint[key] = change(checkpoint[key])
    callbacks = dict(checkpoint.get("callbacks") or {})
    for name, state in callbacks.items():
        if isinstance(state, dict) and isinstance(state.get("average_model_state"), dict):
            callbacks[name] = {**state, "average_model_state": change(state["average_model_state"])}
    if callbacks:
        checkpoint["callbacks"] = callbacks
    return checkpoint


@unchanged_modules()
def nonfinite_message(model: nn.Module, state: Mapping[str, Any], path: object) -> str:
    """Return why a state with NaN or infinity is not written; "" if it can be.

    Everything that a file is read for must be finite, running statistics too: a file with other
    values is refused on reading. Buffers that were not finite from the start may stay so.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    checked: set[str] = set()
    if not all(map(in_adapter, tensors)):
        checked = kept_tensors(model).keys() - not_finite_at_start(model)
    bad = [
        key
        for key, value in tensors.items()
        if (in_adapter(key) or strip_compile(key) in checked) and not is_finite(value)
    ]
    if not bad:
        return ""
    return (
        f"{path}: expected finite weights to save, got NaN or infinity in {len(bad)} tensors "
        f"({', '.join(bad[:3])}); not written, former files are untouched"
    )


def leaks(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[str]:
    """Paths in the checkpoint of tensors that share memory with the frozen base."""
    frozen = _addresses(p for p in model.parameters() if not p.requires_grad)
    found = [
        (path, tensor) for path, tensor in _tensors(checkpoint, "") if _addresses([tensor]) & frozen
    ]
    kept = _addresses(kept_tensors(model).values() if found else ())
    return [path for path, tensor in found if not _addresses([tensor]) & kept]


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Where the tensors' memory begins, without those that have none."""
    found = (_local(t).untyped_storage().data_ptr() for t in tensors if t.device.type != "meta")
    return set(found) - {0}


def _local(t: Tensor) -> Tensor:
    """This process's shard of a DTensor, which itself has no memory to point to."""
    own: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return own


def _tensors(value: object, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _tensors(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _tensors(child, f"{path}[{index}]")
