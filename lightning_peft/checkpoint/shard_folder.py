"""A checkpoint as a folder: one shard per rank, and what the shards have in common.

On a disk that all machines share, each rank writes ``piece-<rank>.pt`` into a temporary folder.
Rank 0 checks that every shard is there, writes ``meta.pt`` and renames the folder. At an fsspec
address there is no rename: shards get names of their own, and ``meta.pt``, written last, lists
them.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.damage import DamagedCheckpointError, damage_of
from lightning_peft.checkpoint.sharded import OwnRows, gather_optimizers, gather_tensors, own_part
from lightning_peft.core.collectives import gather_from_all_ranks, raise_on_all_ranks

__all__ = [
    "check_shared",
    "is_folder",
    "prune",
    "read_file",
    "read_folder",
    "write_address",
    "write_folder",
]

_META = "meta.pt"
_SHARDED = ("state_dict", "optimizer_states")
_PATIENCE = 5.0  # seconds until a network file system must show a file that another machine wrote


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path or an fsspec address is a checkpoint in shards."""
    if atomic_file.is_local(path):
        return Path(path).is_dir()
    fs, place = _file_system(path)
    return bool(fs.exists(f"{place}/{_META}"))


def _file_system(address: str | os.PathLike[str]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    fs, place = url_to_fs(os.fspath(address))
    return fs, str(place).rstrip("/")


# ---- a folder that every machine sees


def check_shared(folder: Path) -> None:
    """Raise on every rank unless all ranks see a file that rank 0 writes into the folder.

    Every rank must call it, with the same path.

    Raises:
        RuntimeError: with the ranks that do not see it.
    """
    names: list[Any] = gather_from_all_ranks(f".seen-by-all-{uuid.uuid4().hex[:12]}")
    token, error = folder / names[0], None
    try:
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
    except OSError as caught:
        error = caught
    raise_on_all_ranks(error, f"writing to {folder}")
    seen = gather_from_all_ranks(_appears(token))
    with contextlib.suppress(OSError):
        if dist.get_rank() == 0:
            token.unlink()
    blind = [rank for rank, found in enumerate(seen) if not found]
    if blind:
        raise RuntimeError(
            f"{folder}: expected a folder that all {len(seen)} processes share, for a checkpoint "
            f"in shards, got one that ranks {blind[:8]} do not see; {_REMEDY}"
        )


_REMEDY = (
    "give ModelCheckpoint a dirpath on a disk that all machines mount, or an fsspec address such "
    "as s3://bucket/run, or set save_distributed_checkpoint=False, which gathers to one file on "
    "rank 0"
)


def _appears(path: Path, size: int | None = None) -> bool:
    """Whether a file is there, with this size; network file systems may show it late."""
    end = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # renews what the client of a network file system remembers
            if size in (None, path.stat().st_size):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


# ---- writing


def write_folder(checkpoint: Mapping[str, Any], temporary: Path, target: Path) -> None:
    """Write shards into a temporary folder; rename it when every rank's shard is in it.

    Every rank must call it, with the same paths.

    Raises:
        RuntimeError: on every rank; another rank failed, or the ranks share no disk. Nothing is
            left under `target` but the former checkpoint.
    """
    if dist.get_rank() == 0 and target.parent.exists():
        atomic_file.remove_stale(target.parent)
    try:
        _fill_folder(checkpoint, temporary, target)
    except BaseException:  # of any rank, which may be dead
        if dist.get_rank() == 0:
            atomic_file.remove(temporary)
        else:  # on another machine it is another folder
            (temporary / _piece(dist.get_rank())).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                temporary.rmdir()
        raise
    if dist.get_rank() == 0:
        atomic_file.publish(temporary, target)


def _piece(rank: int, token: str = "") -> str:
    return f"piece-{rank}{token and '-'}{token}.pt"


def _fill_folder(checkpoint: Mapping[str, Any], folder: Path, target: Path) -> None:
    """Write this rank's shard and, on rank 0, what the shards have in common."""
    own = {key: checkpoint[key] for key in _SHARDED if key in checkpoint}
    error: Exception | None = None
    size, file = 0, folder / _piece(dist.get_rank())
    try:
        atomic_file.write(own, file)
        size = file.stat().st_size
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, f"saving {folder}")
    sizes = gather_from_all_ranks(size)
    if dist.get_rank() == 0:
        absent = [r for r, n in enumerate(sizes) if not _appears(folder / _piece(r), n)]
        if absent:
            error = RuntimeError(
                f"{target}: expected {len(sizes)} shards, got none of ranks {absent[:8]} on the "
                f"disk of rank 0; not saved. The processes share no disk: {_REMEDY}"
            )
    raise_on_all_ranks(error, f"saving {target}")
    if dist.get_rank() == 0:
        atomic_file.write({**_common(checkpoint), "shards": len(sizes)}, folder / _META)
        prune(folder, len(sizes))


def _common(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key not in _SHARDED}


def prune(folder: Path, shards: int) -> None:
    """Remove what an interrupted save left: shards of more processes than there are."""
    kept = {_META, *(_piece(rank) for rank in range(shards))}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()


def write_address(checkpoint: Mapping[str, Any], address: str) -> None:
    """Write shards to an fsspec address; the former checkpoint counts until ``meta.pt`` is new.

    Every rank must call it, with the same address.

    Raises:
        RuntimeError: on every rank, if one rank failed.
    """
    fs, place = _file_system(address)
    token = str(gather_from_all_ranks(uuid.uuid4().hex[:8])[0])
    own = {key: checkpoint[key] for key in _SHARDED if key in checkpoint}
    error: Exception | None = None
    try:
        fs.makedirs(place, exist_ok=True)
        with fs.open(f"{place}/{_piece(dist.get_rank(), token)}", "wb") as file:
            torch.save(own, file)
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, f"saving {address}")
    ranks = dist.get_world_size()
    pieces = [_piece(rank, token) for rank in range(ranks)]
    if dist.get_rank() == 0:
        try:
            found = {str(name).rpartition("/")[2] for name in fs.ls(place, detail=False)}
            if absent := [name for name in pieces if name not in found]:
                raise RuntimeError(
                    f"{address}: expected {ranks} shards, {absent[:8]} are not there; not saved. "
                    f"The processes reach different places: {_REMEDY}"
                )
            with fs.open(f"{place}/{_META}", "wb") as file:
                torch.save({**_common(checkpoint), "shards": ranks, "pieces": pieces}, file)
            for name in found - {_META, *pieces}:
                fs.rm(f"{place}/{name}")
        except Exception as caught:
            error = caught
    raise_on_all_ranks(error, f"saving {address}")


# ---- reading


def read_folder(path: str | Path, own: OwnRows | None = None) -> dict[str, Any]:
    """Read a checkpoint in shards.

    Args:
        path: The folder, or an fsspec address.
        own: If given, every rank must call this, and reads its own rows of sharded tensors alone;
            the other rows are zero.

    Raises:
        ValueError: a piece is missing or cannot be read.
    """
    names = _listed(path)
    if _META not in names:
        raise ValueError(
            f"{path}: expected a folder with {_META}, which is written last, got "
            f"{sorted(names)[:10]}; it was never finished: take another checkpoint"
        )
    meta = _read(path, _META)
    ranks = meta.pop("shards")
    files = meta.pop("pieces", None) or [_piece(rank) for rank in range(ranks)]
    missing = [name for name in files if name not in names]
    if missing:
        raise ValueError(f"{path}: expected {len(files)} shards, {missing} are missing")
    if own is not None and atomic_file.is_local(path):
        _check_together([Path(path) / name for name in files])
        shards = [_mapped(Path(path) / name) for name in files]
    else:
        shards = [_read(path, name) for name in files]
    meta["state_dict"] = gather_tensors([p["state_dict"] for p in shards], own)
    if "optimizer_states" in shards[0]:
        count = len(shards[0]["optimizer_states"])
        meta["optimizer_states"] = [
            gather_optimizers([p["optimizer_states"][i] for p in shards], own) for i in range(count)
        ]
    return meta


def read_file(path: Path, own: OwnRows) -> dict[str, Any]:
    """Read a checkpoint of one file; every rank must call it, and reads its own rows alone.

    Raises:
        FileNotFoundError: no such file, on some rank.
        ValueError: the file is damaged or no checkpoint.
    """
    present = gather_from_all_ranks(path.exists())
    if not all(present):
        without = [rank for rank, found in enumerate(present) if not found]
        where = "no such file" if len(without) == len(present) else f"none on ranks {without[:8]}"
        raise FileNotFoundError(
            f"{path}: expected a checkpoint, found {where}; give a path that every machine sees, "
            "or copy the file to all of them"
        )
    _check_together([path])
    if not _is_archive(path):
        return atomic_file.read(path)
    loaded = _mapped(path)
    if not isinstance(loaded.get("state_dict"), Mapping):
        return loaded
    return own_part(loaded, own)


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _mapped(path: Path) -> dict[str, Any]:
    """Load a file whose tensors are read from disk when they are used."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch names no class for a damaged file, an older format or an object
        return atomic_file.read(path)  # reads it without a map, or raises with the reason
    return loaded if isinstance(loaded, dict) else atomic_file.read(path)


def _check_together(files: Sequence[Path]) -> None:
    """Check the checksums of files, each on one rank.

    Raises:
        DamagedCheckpointError: on every rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = [(i, damage_of(file)) for i, file in enumerate(files) if i % ranks == rank]
    found = [bad for part in gather_from_all_ranks(own) for bad in part if bad[1]]
    if found:
        number, why = min(found)
        raise DamagedCheckpointError(files[number], why)


def _listed(path: str | Path) -> set[str]:
    if atomic_file.is_local(path):
        return {p.name for p in Path(path).iterdir()}
    fs, place = _file_system(path)
    return {str(name).rpartition("/")[2] for name in fs.ls(place, detail=False)}


def _read(path: str | Path, name: str) -> dict[str, Any]:
    if atomic_file.is_local(path):
        return atomic_file.read(Path(path) / name)
    fs, place = _file_system(path)
    with fs.open(f"{place}/{name}", "rb") as file:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found
