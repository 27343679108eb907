"""Writes the packed weights of all ranks into a folder that appears when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.packed_blocks import block_checksums
from lightning_peft.core.collectives import gather_from_all_ranks
from lightning_peft.storage.dtensor import is_sharded, local, local_rows

__all__ = ["FORMAT", "INDEX", "PackedWriter", "own_rank", "read_index"]

INDEX = "index.json"
FORMAT = 2  # 1 had no checksums


def own_rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def read_index(file: Path) -> dict[str, Any]:
    """Read what `PackedWriter` wrote about a folder.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file is damaged.
    """
    content: dict[str, Any] = json.loads(file.read_text())
    if content.pop("checksum") != _checksum(content):
        raise ValueError("its checksum is wrong")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class PackedWriter:
    """Writes one rank's rows into a temporary folder that all ranks share.

    Args:
        directory: The cache.
        key: Name of the folder that will appear in it.
    """

    def __init__(self, directory: Path, key: str) -> None:
        temporary = atomic_file.temporary_path(directory / f"{key}-{uuid.uuid4().hex[:6]}")
        self._folder = Path(gather_from_all_ranks(str(temporary))[0])
        self._file = self._folder / f"rank-{own_rank():05d}.bin"
        self._pieces: list[tuple[str, str, dict[str, Any]]] = []
        self._offset, self._problem = 0, ""
        self._key = key
        if own_rank() == 0 and directory.exists():
            atomic_file.remove_stale(directory)

    def add(self, name: str, role: str, t: Tensor) -> None:
        """Append the own rows of a tensor."""
        own = local(t.detach())
        first = local_rows(t)[0] if is_sharded(t) else 0
        data = own.contiguous().view(-1).view(torch.uint8).cpu().numpy()
        if self._problem or not data.size:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as handle:
                handle.write(data.data)
        except OSError as error:  # a full disk must not end a run that has its weights
            self._problem = str(error)
            return
        place = {
            "file": self._file.name,
            "offset": self._offset,
            "size": data.size,
            "first": first,
            "rows": own.shape[0] if own.ndim else 1,
            "checksums": block_checksums(data.data),
        }
        self._pieces.append((name, role, place))
        self._offset += data.size

    def publish(self, target: Path, hashes: Mapping[str, str], problem: str) -> None:
        """Write the index and rename the folder, on rank 0. Every rank must call it.

        Args:
            target: The folder that appears.
            hashes: Fingerprints by name in the files.
            problem: Why nothing may be published; "" on most ranks.
        """
        own = {
            "problem": problem or self._problem,
            "pieces": self._pieces,
            "size": self._offset,
        }
        parts = gather_from_all_ranks(own)
        if own_rank() == 0:
            self._publish(target, hashes, parts)
        gather_from_all_ranks(None)  # rank 0 has published
        atomic_file.remove(self._folder)  # on disks that rank 0 does not see, its pieces are left

    def _publish(
        self, target: Path, hashes: Mapping[str, str], parts: list[dict[str, Any]]
    ) -> None:
        problem = next((p["problem"] for p in parts if p["problem"]), "")
        try:
            if not problem:
                problem = self._write_index(parts, hashes)
            if not problem:
                os.rename(self._folder, target)
        except OSError as error:
            # Another run was first, with the same content.
            problem = "" if (target / INDEX).exists() else str(error)
        atomic_file.remove(self._folder)
        if problem:
            warnings.warn(f"packed_cache {target}: not written: {problem}", stacklevel=2)

    def _write_index(self, parts: list[dict[str, Any]], hashes: Mapping[str, str]) -> str:
        weights: dict[str, dict[str, list[Any]]] = {}
        files = {}
        for rank, part in enumerate(parts):
            name = f"rank-{rank:05d}.bin"
            if not part["size"]:
                continue
            file = self._folder / name
            if not file.exists() or file.stat().st_size != part["size"]:
                return f"the file of rank {rank} is not on the disk of rank 0; give a shared folder"
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            files[name] = part["size"]
            for weight, role, place in part["pieces"]:
                weights.setdefault(weight, {}).setdefault(role, []).append(place)
        known = {name: hashes[name] for name in weights if name in hashes}
        content = {"format": FORMAT, "key": self._key, "files": files, "weights": weights}
        content["hashes"] = known
        with (self._folder / INDEX).open("w") as handle:
            json.dump({**content, "checksum": _checksum(content)}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        return ""
