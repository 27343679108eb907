"""A checkpoint in shards, one per rank, and the complete file that they form.

A piece holds this process's rows of everything a checkpoint holds of the model, and its part of the
optimizers' state. Pieces are joined in memory for a file, or written beside each other as a folder
(`piece-<rank>.pt` and, last, `meta.pt`). The whole is what a single process would have written, so
any strategy reads it, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.checkpoint import atomic_file
from lightning_peft.core.collectives import raise_on_all_ranks
from lightning_peft.optim import PooledOptimizer, join_shards, shard
from lightning_peft.optim.state_pool import local
from lightning_peft.storage.dtensor import local_rows

__all__ = [
    "gather_optimizers",
    "gather_shards",
    "gather_tensors",
    "is_folder",
    "optimizer_shard",
    "prune",
    "read_folder",
    "shard_optimizer_state",
    "tensor_shards",
    "write_folder",
]

_META = "meta.pt"
_SHARDED = ("state_dict", "optimizer_states")
Shard = dict[str, Any]


# ---- taken apart


def tensor_shards(tensors: Mapping[str, Tensor]) -> Shard:
    """This process's rows of each tensor, on the CPU."""
    return {
        name: {
            "shape": list(t.shape),
            "first": local_rows(t)[0],
            "rows": local(t.detach()).to("cpu", copy=True),
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
            "first": local_rows(p)[0] * p[:1].numel() if p.ndim else 0,
            "state": {
                k: local(v).detach().to("cpu", copy=True) if isinstance(v, Tensor) else v
                for k, v in state.items()
            },
        }
    return {"state": states, "param_groups": saved["param_groups"]}


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


def gather_tensors(shards: Sequence[Shard]) -> dict[str, Tensor]:
    """The whole tensors."""
    whole = {}
    for name, first in shards[0].items():
        if list(first["rows"].shape) == first["shape"]:  # one process holds all, or all hold it
            whole[name] = first["rows"]
            continue
        out = torch.empty(first["shape"], dtype=first["rows"].dtype)
        for piece in shards:
            rows = piece[name]["rows"]
            out[piece[name]["first"] : piece[name]["first"] + rows.shape[0]] = rows
        whole[name] = out
    return whole


def gather_optimizers(shards: Sequence[Shard]) -> dict[str, Any]:
    """The state dict that one process would have had."""
    states = {key: _join([piece["state"][key] for piece in shards]) for key in shards[0]["state"]}
    return {"state": states, "param_groups": shards[0]["param_groups"]}


def _join(parts: Sequence[Shard]) -> dict[str, Any]:
    shape, one = parts[0]["shape"], parts[0]["state"]
    n = torch.Size(shape).numel()
    if "state1" in one:
        if one["state1"].numel() == n:
            return dict(one)
        held = sorted((p for p in parts if p["state"]["state1"].numel()), key=lambda p: p["first"])
        return join_shards([p["state"] for p in held], exact=True)
    whole: dict[str, Any] = {}
    for name, value in one.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or list(value.shape) == shape:
            whole[name] = value
            continue
        out = torch.empty(n, dtype=value.dtype)
        for part in parts:
            flat = part["state"][name].reshape(-1)
            out[part["first"] : part["first"] + flat.numel()] = flat
        whole[name] = out.view(shape)
    return whole


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
        width = p[:1].numel() if p.ndim else 1
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

    sharded: Any = p
    made: Tensor = DTensor.from_local(
        part.to(local(p).device),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )
    return made


# ---- as a folder


def is_folder(path: Any) -> bool:
    """Whether a path is a checkpoint in shards."""
    return atomic_file.is_local(path) and Path(path).is_dir()


def write_folder(checkpoint: Mapping[str, Any], temporary: Path, target: Path) -> None:
    """Write shards into a temporary folder; rename it when every rank has written its shard.

    Every rank must call it, with the same paths.
    """
    if dist.get_rank() == 0 and target.parent.exists():
        atomic_file.remove_stale(target.parent)
    try:
        _fill_folder(checkpoint, temporary)
    except BaseException:  # of any rank, which may be dead
        if dist.get_rank() == 0:
            atomic_file.remove(temporary)
        raise
    if dist.get_rank() == 0:
        atomic_file.publish(temporary, target)


def _fill_folder(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write this rank's shard and, on rank 0, what the shards have in common."""
    own = {key: checkpoint[key] for key in _SHARDED if key in checkpoint}
    error: Exception | None = None
    try:
        atomic_file.write(own, folder / f"piece-{dist.get_rank()}.pt")
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, f"saving {folder}")
    if dist.get_rank() == 0:
        common = {key: value for key, value in checkpoint.items() if key not in _SHARDED}
        ranks = dist.get_world_size()
        atomic_file.write({**common, "shards": ranks}, folder / _META)
        prune(folder, ranks)


def prune(folder: Path, shards: int) -> None:
    """Remove what an interrupted save left: shards of more processes than there are."""
    kept = {_META, *(f"piece-{rank}.pt" for rank in range(shards))}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()


def read_folder(path: Path) -> dict[str, Any]:
    """The whole checkpoint from its shards.

    Raises:
        ValueError: a piece is missing or cannot be read.
    """
    if not (path / _META).exists():
        raise ValueError(
            f"{path}: expected a folder with {_META}, which is written last, got "
            f"{sorted(p.name for p in path.iterdir())[:10]}; it was never finished: take another "
            "checkpoint"
        )
    meta = atomic_file.read(path / _META)
    files = [path / f"piece-{rank}.pt" for rank in range(meta.pop("shards"))]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise ValueError(f"{path}: expected {len(files)} shards, {missing} are missing")
    shards = [atomic_file.read(f) for f in files]
    meta["state_dict"] = gather_tensors([p["state_dict"] for p in shards])
    if "optimizer_states" in shards[0]:
        count = len(shards[0]["optimizer_states"])
        meta["optimizer_states"] = [
            gather_optimizers([p["optimizer_states"][i] for p in shards]) for i in range(count)
        ]
    return meta
