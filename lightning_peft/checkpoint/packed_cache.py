"""A cache of packed weights: quantised on the first start, read on every later one.

A folder per base and quantisation holds one file per rank that wrote, and ``index.json``, which is
written last. The key is a hash of names, shapes and sampled values of the base's files and of how
each weight is packed. Weights that are not packed are read from the base in any case.

The folder appears by one rename, so several ranks and several runs may share a cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.checkpoint import atomic_file
from lightning_peft.core.collectives import (
    check_same_on_all_ranks,
    gather_from_all_ranks,
    raise_on_all_ranks,
)
from lightning_peft.core.names import strip_compile
from lightning_peft.storage import storage_of
from lightning_peft.storage.base_files import BaseFiles
from lightning_peft.storage.dtensor import is_first_replica, is_sharded, local, local_rows
from lightning_peft.storage.packed import specs_of

__all__ = ["PackedCache"]

_INDEX = "index.json"
_FORMAT = 1
_SAMPLES = 8  # values per tensor in the key


class PackedCache:
    """The packed weights of one model, in a folder of a cache directory.

    Args:
        directory: The cache, on a disk that all ranks share.
        base: The files of the base, matched to the model.

    Attributes:
        folder: Where the packed weights are, or will be.
        hashes: Fingerprints of the weights in the cache, by canonical name; empty while it is
            written.

    Raises:
        ValueError: the folder is there, but belongs to another base or is incomplete; or the
            directory is a file.
        RuntimeError: ranks have different files.
    """

    def __init__(self, directory: str | Path, base: BaseFiles) -> None:
        if Path(directory).is_file():
            raise ValueError(f"packed_cache: expected a directory, got the file {directory}")
        self._key = _key_of(base)
        check_same_on_all_ranks(
            {"key of the packed base": self._key},
            "packed_cache",
            "give every process the same base and the same quantization",
        )
        self.folder = Path(directory) / self._key
        self.hashes: dict[str, str] = {}
        self._base = base
        self._entries: dict[str, Any] = {}
        self._writer: _Writer | None = None
        present = gather_from_all_ranks(self.folder.exists())
        if all(present):
            error: Exception | None = None
            try:
                self._open()
            except Exception as caught:
                error = caught
            raise_on_all_ranks(error, f"packed_cache {self.folder}")
        elif not any(present):
            self._writer = _Writer(Path(directory), self._key)

    @property
    def is_complete(self) -> bool:
        """Whether weights are read from the cache."""
        return bool(self._entries)

    def _open(self) -> None:
        index = self.folder / _INDEX
        remedy = "delete this folder; the next start writes it again"
        if not index.exists():
            found = sorted(p.name for p in self.folder.iterdir())[:5]
            raise ValueError(f"{self.folder}: expected {_INDEX}, got {found}; {remedy}")
        try:
            content = json.loads(index.read_text())
            key, files, weights = content["key"], content["files"], content["weights"]
            hashes, number = content["hashes"], content["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{index}: expected the index of a packed base, got a damaged file ({error}); "
                f"{remedy}"
            ) from error
        if number != _FORMAT or key != self._key:
            raise ValueError(
                f"{self.folder}: expected the packed base {self._key} in format {_FORMAT}, got "
                f"{key} in format {number}, of another base or quantization; {remedy}"
            )
        for name, size in files.items():
            file = self.folder / name
            have = file.stat().st_size if file.exists() else "no file"
            if have != size:
                raise ValueError(f"{file}: expected {size} bytes, got {have}; {remedy}")
        self._entries = weights
        for name in self._base.wanted:
            stored = self._base.name_in_file(name)
            if stored in hashes:
                self.hashes[strip_compile(name)] = hashes[stored]

    # ---- while the base is read

    def fill(self, name: str, module: nn.Module, key: str) -> bool:
        """Copy a packed weight's own rows out of the cache; False if the cache lacks it."""
        entry = self._entries.get(self._base.name_in_file(name))
        if entry is None:
            return False
        for role, t in _tensors(module, key):
            own = local(t.detach())
            first, rows = local_rows(t) if is_sharded(t) else (0, t.shape[0] if t.ndim else 1)
            flat = own.view(-1).view(torch.uint8)
            width = t.numel() * t.element_size() // max(1, t.shape[0] if t.ndim else 1)
            for piece in entry[role]:
                start, count = piece["first"], piece["rows"]
                low, high = max(first, start), min(first + rows, start + count)
                if low < high:
                    offset = piece["offset"] + (low - start) * width
                    read = _read(self.folder / piece["file"], offset, (high - low) * width)
                    flat[(low - first) * width : (high - first) * width].copy_(read)
        return True

    def keep(self, name: str, module: nn.Module, key: str) -> None:
        """Write a packed weight's own rows; replicated tensors are written by rank 0."""
        if self._writer is not None:
            for role, t in _tensors(module, key):
                if is_first_replica(t) if is_sharded(t) else _rank() == 0:
                    self._writer.add(self._base.name_in_file(name), role, t)

    def finish(self, hashes: Mapping[str, str]) -> None:
        """Publish what was written. Every rank must call it.

        A cache that cannot be written is a warning, not an error: the weights are there.

        Args:
            hashes: Fingerprints of weights, by canonical name.
        """
        if self._writer is not None:
            plain = {self._base.name_in_file(n): strip_compile(n) for n in self._base.wanted}
            known = {file: hashes[name] for file, name in plain.items() if name in hashes}
            self._writer.publish(self.folder, known)
            self._writer = None


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _tensors(module: nn.Module, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (role, tensor) of everything that holds a packed weight."""
    for part in storage_of(module, key).iter_tensors(module, key):
        yield part.role, part.tensor


def _read(file: Path, offset: int, size: int) -> Tensor:
    out = torch.empty(size, dtype=torch.uint8)
    with file.open("rb", buffering=0) as handle:
        handle.seek(offset)
        view: memoryview = out.numpy().data
        got = 0
        while got < size and (n := handle.readinto(view[got:])):
            got += n
    if got != size:
        raise ValueError(f"{file}: expected {size} bytes at {offset}, got {got}; delete the folder")
    return out


def _key_of(base: BaseFiles) -> str:
    """Return a hash of the base's files and of how its weights are packed."""
    digest = hashlib.sha256(f"format {_FORMAT}".encode())
    for name, (module, key) in base.wanted.items():
        shape = base.shape_in_file(name)
        digest.update(f"{base.name_in_file(name)} {list(shape)}".encode())
        if storage_of(module, key).is_quantized:
            digest.update(_description(specs_of(module)[key]).encode())
        with base.open(name) as source:
            for where in _places(shape):
                digest.update(source[where].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def _description(spec: Any) -> str:
    names = [f.name for f in dataclasses.fields(spec) if f.name not in ("keys", "formats")]
    kept = {name: str(getattr(spec, name)) for name in names}
    return f"{type(spec).__name__} {sorted(kept.items())}"


def _places(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the places of single elements, at even distances."""
    total = torch.Size(shape).numel()
    if not shape or not total:
        return
    for i in range(0, total, max(1, total // _SAMPLES)):
        yield tuple(slice(int(c), int(c) + 1) for c in torch.unravel_index(torch.tensor(i), shape))


class _Writer:
    """Writes one rank's rows into a temporary folder that all ranks share."""

    def __init__(self, directory: Path, key: str) -> None:
        temporary = atomic_file.temporary_path(directory / f"{key}-{uuid.uuid4().hex[:6]}")
        self._folder = Path(gather_from_all_ranks(str(temporary))[0])
        self._file = self._folder / f"rank-{_rank():05d}.bin"
        self._pieces: list[tuple[str, str, dict[str, Any]]] = []
        self._offset, self._problem = 0, ""
        self._key = key
        if _rank() == 0 and directory.exists():
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
        rows = own.shape[0] if own.ndim else 1
        place = {"file": self._file.name, "offset": self._offset, "first": first, "rows": rows}
        self._pieces.append((name, role, place))
        self._offset += data.size

    def publish(self, target: Path, hashes: Mapping[str, str]) -> None:
        """Write the index and rename the folder, on rank 0."""
        own = {"problem": self._problem, "pieces": self._pieces, "size": self._offset}
        parts = gather_from_all_ranks(own)
        if _rank() != 0:
            gather_from_all_ranks(None)  # rank 0 has published
            return
        problem = next((p["problem"] for p in parts if p["problem"]), "")
        try:
            if not problem:
                problem = self._write_index(parts, hashes)
            if not problem:
                os.rename(self._folder, target)
        except OSError as error:
            # Another run was first, with the same content.
            problem = "" if (target / _INDEX).exists() else str(error)
        atomic_file.remove(self._folder)
        if problem:
            warnings.warn(f"packed_cache {target}: not written: {problem}", stacklevel=2)
        gather_from_all_ranks(None)

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
        content = {"format": _FORMAT, "key": self._key, "files": files, "weights": weights}
        text = json.dumps({**content, "hashes": known})
        (self._folder / _INDEX).write_text(text)
        return ""
