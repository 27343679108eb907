"""Checkpoints for any training loop: Fabric, accelerate or plain torch.

The file has the format of the callback: adapters and a description of them, never the base.
`load_from_checkpoint` and the Trainer's validate, test and predict read it too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.contents import (
    adapters_of_file,
    load_kept,
    nonfinite_message,
)
from lightning_peft.checkpoint.description import KEY, describe, is_attached
from lightning_peft.checkpoint.kept import kept_base_tensors, kept_tensors
from lightning_peft.checkpoint.masked_weights import masked_as_stored
from lightning_peft.checkpoint.plain_data import fields_not_plain
from lightning_peft.checkpoint.rng_state import gather_rng_states, restore_rng
from lightning_peft.checkpoint.shard_folder import is_folder, read_folder
from lightning_peft.checkpoint.sharded import (
    gather_optimizers,
    gather_shards,
    gather_tensors,
    optimizer_shard,
    shard_optimizer_state,
    tensor_shards,
)
from lightning_peft.checkpoint.verification import verify
from lightning_peft.core.collectives import raise_on_all_ranks
from lightning_peft.core.marker import marked
from lightning_peft.core.modules import require_module, unchanged_modules
from lightning_peft.initialization.data_driven import waiting_adapters
from lightning_peft.initialization.restore import restore_initialized
from lightning_peft.models.history import note_moved, note_optimizers, start_history
from lightning_peft.optim.state_check import check_optimizer_state, converted_state
from lightning_peft.optim.state_names import in_live_order, names_of, stepped_names
from lightning_peft.optim.wrappers import unwrap_optimizer
from lightning_peft.storage.dtensor import local

__all__ = ["load_checkpoint", "save_checkpoint"]

_WEIGHTS, _OPTIMIZERS = "state_dict", "optimizer_states"
_RESERVED = (KEY, _WEIGHTS, _OPTIMIZERS, "weights_only")


@unchanged_modules()
def save_checkpoint(module: nn.Module, path: str | os.PathLike[str], **state: Any) -> None:
    """Write adapters and the state of a training loop to one file, atomically.

    On several processes every rank calls it; rank 0 writes. If writing fails on one rank, all
    ranks raise, and the former file stays. Random states of all ranks are written too.

        save_checkpoint(model, "last.ckpt", optimizer=optimizer, scheduler=scheduler, epoch=3)

    Args:
        module: The adapted model. Wrappers of Fabric, DDP and torch.compile may be around it; they
            leave no trace in the keys.
        path: The file to write.
        **state: Objects with a `state_dict`, such as optimizers, schedulers and `MethodHooks`, and
            plain data, such as a step count.

    Raises:
        ValueError: no adapter is attached, or a reserved name in `state`.
        TypeError: a value in `state` that is not plain data.
        OSError: the disk is full; the former file is unchanged.
        RuntimeError: a trained tensor holds NaN or infinity; the former file is unchanged.
    """
    model = _unwrap_module(module)
    if not is_attached(model):
        raise ValueError(
            f"save_checkpoint: expected a model with adapters, got {type(model).__name__} without; "
            "call attach(model, method) first, or save it with torch.save"
        )
    optimizers = _optimizers_in(state)
    plain = {
        name: value.state_dict() if hasattr(value, "state_dict") else value
        for name, value in state.items()
        if name not in optimizers
    }
    _check_names(state)
    _check_plain(plain)
    start_history(model)
    note_optimizers(model, optimizers.values())
    note_moved(model)
    base = kept_base_tensors(model)
    kept = {**trained_tensors(model), **base}
    own = tensor_shards(kept)
    states = [optimizer_shard(optimizer) for optimizer in optimizers.values()]
    if _is_sharded(kept):
        shards, gathered = gather_shards(own), [gather_shards(s) for s in states]
    else:  # every rank holds all of it
        shards, gathered = [own], [[s] for s in states]
    random = gather_rng_states(_device_of(model))
    error: Exception | None = None
    if _rank() == 0:
        named = dict(model.named_parameters())
        entry = {
            "rng": random,
            "optimizers": [names_of(o, named) for o in optimizers.values()],
            "stepped": [stepped_names(o, named) for o in optimizers.values()],
        }
        weights = gather_tensors(shards)
        checkpoint = {
            **plain,
            _WEIGHTS: marked(weights),
            _OPTIMIZERS: [gather_optimizers(each) for each in gathered],
            KEY: {**describe(model, base), **entry},
        }
        try:
            if text := nonfinite_message(model, weights, os.fspath(path)):
                raise RuntimeError(
                    f"{text}. Resume from one of them with a lower learning rate, "
                    "or without the batch that had bad values"
                )
            atomic_file.write(checkpoint, path)
        except Exception as caught:
            error = caught
    raise_on_all_ranks(error, f"saving {os.fspath(path)}")


def load_checkpoint(
    module: nn.Module, path: str | os.PathLike[str], *, weights_only: bool = True, **state: Any
) -> dict[str, Any]:
    """Read adapters and the state of a training loop, after checking all of it.

    The model must have the adapters and the base of the file. Optimizers are matched by parameter
    names. With an optimizer, training is taken to continue: the quantisation must be that of the
    file too, and random states are restored if the number of ranks is the same. Without one,
    another quantisation of the base is only warned about.

        rest = load_checkpoint(model, "last.ckpt", optimizer=optimizer, scheduler=scheduler)
        first_epoch = rest["epoch"] + 1

    Args:
        module: The model with its adapters attached. Wrappers may be around it.
        path: A file of `save_checkpoint`, or of a Trainer with the PEFT callback.
        weights_only: If False, hyper-parameters that are objects are unpickled, which may run code
            of the file.
        **state: Objects to restore, under the names they were saved with.

    Returns:
        All other entries of the file, such as plain data; without `optimizer`, the states too.

    Raises:
        FileNotFoundError: no such file.
        UnpicklingError: the file holds objects, and `weights_only` is True.
        ValueError: other adapters, another base, tensors or states that do not fit; nothing is
            loaded.
    """
    model, source = _unwrap_module(module), os.fspath(path)
    optimizers = _optimizers_in(state)
    _check_names(state)
    error: Exception | None = None
    try:
        checkpoint = _read(source, weights_only)
        with masked_as_stored(model, checkpoint[_WEIGHTS]):
            verify(model, checkpoint, source, resuming=bool(optimizers))
        _check_state(checkpoint, state, optimizers, source)
        if optimizers and waiting_adapters(model):
            raise ValueError(
                f"{source}: expected adapters with their final shape, got adapters that start from "
                "data; call load_checkpoint(model, path) before you create the optimizer, then "
                "again with it"
            )
        loaded = _optimizer_states(model, checkpoint, optimizers)
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, f"loading {source}")
    start_history(model)
    restore_initialized(model, checkpoint[_WEIGHTS])
    load_kept(model, checkpoint[_WEIGHTS])
    for optimizer, found in zip(optimizers.values(), loaded, strict=True):
        optimizer.load_state_dict(found)
    others = [name for name in state if name not in optimizers]
    for name in others:
        state[name].load_state_dict(checkpoint[name])
    if optimizers:
        _restore_rng(checkpoint[KEY].get("rng"), _device_of(model), source)
    used = {KEY, _WEIGHTS, *others, *([_OPTIMIZERS] if optimizers else [])}
    return {name: value for name, value in checkpoint.items() if name not in used}


def _unwrap_module(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers of Fabric, torch.compile and DDP."""
    require_module(module)
    for child in ("_original_module", "_orig_mod"):
        if child in module._modules:
            return _unwrap_module(module.get_submodule(child))
    if isinstance(module, DistributedDataParallel):
        return _unwrap_module(module.get_submodule("module"))
    return module


def _optimizers_in(state: Mapping[str, Any]) -> dict[str, Optimizer]:
    return {n: unwrap_optimizer(v) for n, v in state.items() if isinstance(v, Optimizer)}


def _check_names(state: Mapping[str, Any]) -> None:
    taken = sorted(set(state) & set(_RESERVED))
    if taken:
        raise ValueError(
            f"checkpoint: expected names other than {', '.join(_RESERVED)}, got {taken}; rename "
            "these arguments"
        )


def _check_plain(state: Mapping[str, Any]) -> None:
    refused = fields_not_plain(state)
    if refused:
        shown = ", ".join(f"{name} ({why})" for name, why in refused)
        raise TypeError(
            "save_checkpoint: expected objects with a state_dict and plain data, which "
            f"torch.load(weights_only=True) reads, got {shown}; convert these to numbers, strings, "
            "lists, dicts or tensors"
        )


def _check_state(
    checkpoint: Mapping[str, Any],
    state: Mapping[str, Any],
    optimizers: Mapping[str, Optimizer],
    source: str,
) -> None:
    others = [name for name in state if name not in optimizers]
    unloadable = [n for n in others if not hasattr(state[n], "load_state_dict")]
    if unloadable:
        raise ValueError(
            f"load_checkpoint: expected objects with a load_state_dict, got {unloadable}; plain "
            "data is in the dict that load_checkpoint returns"
        )
    missing = [n for n in others if n not in checkpoint]
    if missing:
        raise ValueError(
            f"{source}: expected the state of {missing}, found only {sorted(checkpoint)}; give the "
            "names that were given to save_checkpoint"
        )
    saved = len(checkpoint.get(_OPTIMIZERS) or ())
    if optimizers and saved != len(optimizers):
        raise ValueError(
            f"{source}: expected {saved} optimizers, as in the file, got {len(optimizers)}; give "
            "those that were saved, in their order"
        )


def _read(source: str, weights_only: bool) -> dict[str, Any]:
    if atomic_file.is_local(source):
        atomic_file.recover(source)
    if is_folder(source):
        checkpoint = read_folder(source)
    else:
        checkpoint = atomic_file.read(source, weights_only=weights_only)
    if _WEIGHTS not in checkpoint:
        raise ValueError(
            f"{source}: expected a checkpoint with {_WEIGHTS!r}, got keys {sorted(checkpoint)}; "
            "give a file of save_checkpoint or of a Trainer with the PEFT callback"
        )
    return adapters_of_file(checkpoint, source)


def _optimizer_states(
    model: nn.Module, checkpoint: Mapping[str, Any], optimizers: Mapping[str, Optimizer]
) -> list[dict[str, Any]]:
    """Return the saved states as the live optimizers number and shard their parameters."""
    if not optimizers:
        return []
    named = dict(model.named_parameters())
    saved, stepped = checkpoint[KEY].get("optimizers"), checkpoint[KEY].get("stepped") or []
    found = []
    for i, (name, optimizer) in enumerate(optimizers.items()):
        state = checkpoint[_OPTIMIZERS][i]
        if saved:
            state = in_live_order(state, saved[i], names_of(optimizer, named), f"state of {name}")
        sharded = _is_sharded(kept_tensors(model))
        names = stepped[i] if i < len(stepped) else ()
        what = f"state of {name}"
        check_optimizer_state(optimizer, state, named, what, stepped=names, sharded=sharded)
        state = converted_state(optimizer, state)
        found.append(shard_optimizer_state(optimizer, state) if sharded else state)
    return found


def _restore_rng(
    states: Sequence[dict[str, Any]] | None, device: torch.device, source: str
) -> None:
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if states is None:
        return
    if len(states) == world:
        restore_rng(states[_rank()], device)
    elif _rank() == 0:
        warnings.warn(
            f"{source}: holds random states of {len(states)} processes, this run has {world}; "
            "dropout and data order go on from the seed instead",
            stacklevel=3,
        )


def _is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(local(t) is not t for t in tensors.values())


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
