"""A process's own rows of a tensor: all of a plain one, its shard of one that FSDP2 cut by rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

__all__ = [
    "ShardGroup",
    "fill_rows",
    "is_first_replica",
    "is_sharded",
    "local",
    "local_rows",
    "shard_group",
    "sharded_like",
]


class ShardGroup(NamedTuple):
    """The ranks over which a tensor is cut by rows.

    Attributes:
        position: Position of this rank among them.
        size: Their number.
        group: Their process group.
    """

    position: int
    size: int
    group: dist.ProcessGroup


def _placements(t: Tensor) -> tuple[Placement, ...]:
    """Return how each axis of the device mesh holds a DTensor."""
    return cast("DTensor", t).placements


def shard_group(t: Tensor) -> ShardGroup | None:
    """Return the ranks that hold the rows of a tensor; None if this process holds all of it."""
    mesh = getattr(t, "device_mesh", None)
    if mesh is None:
        return None
    for axis, placement in enumerate(_placements(t)):
        if placement.is_shard() and mesh.size(axis) > 1:
            return ShardGroup(mesh.get_local_rank(axis), mesh.size(axis), mesh.get_group(axis))
    return None


def is_sharded(t: Tensor) -> bool:
    """Whether FSDP2 cut the tensor, so that this process holds some of its rows."""
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """This process's shard of a DTensor (shares its memory), any other tensor itself."""
    own: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return own


def local_rows(t: Tensor) -> tuple[int, int]:
    """(first row, rows) of this process's part of a tensor; all of a plain one."""
    rows = t.shape[0] if t.ndim else 1
    if not hasattr(t, "to_local"):
        return 0, rows
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast("DTensor", t)
    shape, offset = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    return (int(offset[0]), int(shape[0])) if t.ndim else (0, 1)


def is_first_replica(t: Tensor) -> bool:
    """Whether no other rank with the same rows comes before this one; true for a plain tensor."""
    mesh = getattr(t, "device_mesh", None)
    if mesh is None:
        return True
    axes = [axis for axis, placement in enumerate(_placements(t)) if placement.is_replicate()]
    return all(mesh.get_local_rank(axis) == 0 for axis in axes)


def fill_rows(t: Tensor, value: Tensor) -> None:
    """Copy into `t` this process's rows of a whole tensor, or what is these rows already."""
    own = local(t.detach())
    if own.shape == value.shape:
        own.copy_(value)
        return
    first, rows = local_rows(t)
    own.copy_(value[first : first + rows])


def sharded_like(t: Tensor, own: Tensor) -> Tensor:
    """Return a tensor sharded as `t` whose rows on this process are `own`."""
    if not is_sharded(t):
        return own
    from torch.distributed.tensor import DTensor

    sharded = cast(DTensor, t)
    mesh, placements = sharded.device_mesh, sharded.placements
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=t.shape, stride=t.stride()
    )
