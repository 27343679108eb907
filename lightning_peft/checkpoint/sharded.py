"""A checkpoint in shards, one per rank, and the complete file that they form.

A piece holds this process's rows of everything a checkpoint holds of the model, and its part of the
optimizers' state. Pieces are joined in memory for a file, or written as a folder (`shard_folder`).
The result is what a single process would have written, so any strategy reads it, on any number of
processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.optim import PooledOptimizer, join_shards, shard
from lightning_peft.optim.state_pool import local
from lightning_peft.storage.dtensor import is_first_replica, local_rows

__all__ = [
    "OwnRows",
    "gather_optimizers",
    "gather_shards",
    "gather_tensors",
    "optimizer_shard",
    "own_part",
    "shard_optimizer_state",
    "tensor_shards",
]

Shard = dict[str, Any]


# ---- taken apart


def tensor_shards(tensors: Mapping[str, Tensor]) -> Shard:
    """Return this rank's rows of each tensor on the CPU, without rows an earlier replica has."""
    return {
        name: {
            "shape": list(t.shape),
            "first": local_rows(t)[0],
            "rows": _own_copy(t, t.detach()),
        }
        for name, t in tensors.items()
    }


def optimizer_shard(optimizer: Optimizer) -> Shard:
    """This process's part of an optimizer's state; parameters by position."""
    saved = optimizer.state_dict()
    params = _params(optimizer)
    states = {}
    for key, state in saved["state"].items():
        p = params[key]
        states[key] = {
            "shape": list(p.shape),
            "first": local_rows(p)[0] * _row_width(p),
            "state": {
                k: _own_copy(p, v.detach()) if isinstance(v, Tensor) else v
                for k, v in state.items()
            },
        }
    return {"state": states, "param_groups": saved["param_groups"]}


def _own_copy(p: Tensor, t: Tensor) -> Tensor:
    """Copy what is local of a tensor that belongs to `p`; nothing if an earlier replica has it."""
    own = local(t)
    if own.ndim and not is_first_replica(p):
        own = own.reshape(-1)[:0] if own is not local(p) else own[:0]
    return own.to("cpu", copy=True)


def _row_width(p: Tensor) -> int:
    """Elements per row. A slice of a DTensor would gather all of it on every rank."""
    return p.shape[1:].numel()


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- put together


def gather_shards(own: Shard) -> list[Shard]:
    """Return every rank's shard on rank 0 and nothing elsewhere. Every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    shards: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, shards)
    return shards or []


@dataclass(frozen=True)
class OwnRows:
    """The rows of sharded tensors that one rank holds.

    Attributes:
        index: Position of the rank among those that a tensor is cut over.
        count: Number of these ranks.
        names: Keys of the sharded tensors of a state dict; other tensors are held by every rank.
    """

    index: int
    count: int
    names: frozenset[str]

    def of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the first row and the number of rows, as `torch.chunk` cuts them."""
        size = -(-shape[0] // self.count)
        first = min(self.index * size, shape[0])
        return first, min(size, shape[0] - first)


def gather_tensors(shards: Sequence[Shard], own: OwnRows | None = None) -> dict[str, Tensor]:
    """Join the shards of a state dict.

    Args:
        shards: One per rank that wrote.
        own: If given, only these rows are read; the other rows of a sharded tensor are zero, and
            take no memory.
    """
    full = {}
    for name, first in shards[0].items():
        shape = first["shape"]
        limited = own is not None and name in own.names and bool(shape)
        if list(first["rows"].shape) == shape and not limited:  # every process holds all rows
            full[name] = first["rows"]
            continue
        start, rows = own.of(shape) if limited and own is not None else (0, shape[0])
        parts = [(piece[name]["first"], piece[name]["rows"]) for piece in shards]
        full[name] = _join_rows(parts, shape, first["rows"].dtype, start, start + rows)
    return full


def _join_rows(
    parts: Sequence[tuple[int, Tensor]],
    shape: Sequence[int],
    dtype: torch.dtype,
    start: int,
    stop: int,
) -> Tensor:
    """Return a tensor whose rows from `start` to `stop` come from the parts; zero elsewhere."""
    out = torch.zeros(shape, dtype=dtype)
    for first, rows in parts:
        low, high = max(start, first), min(stop, first + rows.shape[0])
        if low < high:
            out[low:high] = rows[low - first : high - first]
    return out


def gather_optimizers(shards: Sequence[Shard], own: OwnRows | None = None) -> dict[str, Any]:
    """Join the shards of an optimizer's state dict.

    Args:
        shards: One per rank that wrote.
        own: If given, only these rows are read, except for 8-bit state, which is read completely.
    """
    keys = shards[0]["state"]
    states = {key: _join([piece["state"][key] for piece in shards], own) for key in keys}
    return {"state": states, "param_groups": shards[0]["param_groups"]}


def _join(parts: Sequence[Shard], own: OwnRows | None) -> dict[str, Any]:
    shape, one = parts[0]["shape"], parts[0]["state"]
    n = torch.Size(shape).numel()
    if "state1" in one:
        if one["state1"].numel() == n:
            return dict(one)
        held = sorted((p for p in parts if p["state"]["state1"].numel()), key=lambda p: p["first"])
        return join_shards([p["state"] for p in held], exact=True)
    full: dict[str, Any] = {}
    for name, value in one.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            full[name] = value
            continue
        if list(value.shape) == shape and own is None:
            full[name] = value
            continue
        width = n // shape[0] if shape[0] else 0
        first, rows = (0, shape[0]) if own is None else own.of(shape)
        flat = [(part["first"], part["state"][name].reshape(-1)) for part in parts]
        joined = _join_rows(flat, [n], value.dtype, first * width, (first + rows) * width)
        full[name] = joined.view(shape)
    return full


def own_part(checkpoint: Mapping[str, Any], own: OwnRows) -> dict[str, Any]:
    """Return a checkpoint of one file, of whose sharded weights only this rank's rows are read."""
    shard = {
        name: {"shape": list(t.shape), "first": 0, "rows": t}
        for name, t in checkpoint["state_dict"].items()
        if isinstance(t, Tensor)
    }
    weights = {**checkpoint["state_dict"], **gather_tensors([shard], own)}
    return {**checkpoint, "state_dict": weights}


# ---- given out


def shard_optimizer_state(optimizer: Optimizer, whole: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state dict as this process's optimizer over sharded parameters takes it."""
    params, states = _params(optimizer), {}
    keys = [k for group in whole["param_groups"] for k in group["params"]]
    if len(keys) != len(params):
        raise ValueError(
            f"optimizer state: expected {len(params)} parameters, got {len(keys)}; give "
            "configure_optimizers the groups that were saved"
        )
    pooled = isinstance(optimizer, PooledOptimizer)
    for key, p in zip(keys, params, strict=True):
        if key in whole["state"]:
            states[key] = _cut(p, whole["state"][key], pooled)
    return {**whole, "state": states}


def _cut(p: Tensor, state: Mapping[str, Any], pooled: bool) -> dict[str, Any]:
    first, rows = local_rows(p)
    if "shards" in state or ("state1" in state and state["state1"].dtype == torch.uint8):
        width = _row_width(p)
        return shard(dict(state), first * width, rows * width)
    cut: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != p.shape or value.ndim == 0:
            cut[name] = value
            continue
        part = value[first : first + rows].clone()
        cut[name] = part if pooled else _like(p, part)
    return cut


def _like(p: Tensor, part: Tensor) -> Tensor:
    """A DTensor placed as `p` is, plain where `p` is."""
    if local(p) is p:
        return part
    from torch.distributed.tensor import DTensor

    sharded = cast(DTensor, p)
    made: Tensor = DTensor.from_local(
        part.to(local(p).device),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )
    return made
