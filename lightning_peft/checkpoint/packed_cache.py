"""A cache of packed weights: quantised on the first start, read on every later one.

A folder per base and quantisation holds one file per rank that wrote, and ``index.json``, which is
written last. Its name is a hash of the base's files (size, time of the last change, header), of
sampled values, and of how each weight is packed. Weights that are not packed are read from the base
in any case.

The folder appears by one rename, so several ranks and several runs may share a cache. Blocks are
checked against their checksums while they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.checkpoint.packed_blocks import read_checked
from lightning_peft.checkpoint.packed_writer import (
    FORMAT,
    INDEX,
    PackedWriter,
    own_rank,
    read_index,
)
from lightning_peft.core.collectives import (
    check_same_on_all_ranks,
    gather_from_all_ranks,
    raise_on_all_ranks,
)
from lightning_peft.core.names import counted, strip_compile
from lightning_peft.storage import storage_of
from lightning_peft.storage.base_files import BaseFiles
from lightning_peft.storage.dtensor import is_first_replica, is_sharded, local, local_rows
from lightning_peft.storage.packed import specs_of

__all__ = ["PackedCache"]

_SAMPLES = 8  # values per tensor in the key
_REMEDY = "delete this folder; the next start writes it again"


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
        ValueError: the folder is there, but belongs to another base or is incomplete; the
            directory is a file; or no weight is packed.
        RuntimeError: ranks have different files.
    """

    def __init__(self, directory: str | Path, base: BaseFiles) -> None:
        if Path(directory).is_file():
            raise ValueError(f"packed_cache: expected a directory, got the file {directory}")
        if not any(storage_of(*place).is_quantized for place in base.wanted.values()):
            raise ValueError(
                f"packed_cache {directory}: expected a base with packed weights, got one without; "
                "give a quantization, or leave packed_cache out"
            )
        self._stamps = base.stamps()
        self._key = _key_of(base, gather_from_all_ranks(self._stamps))
        check_same_on_all_ranks(
            {"key of the packed base": self._key},
            "packed_cache",
            "give every process the same base and the same quantization",
        )
        self.folder = Path(directory) / self._key
        self.hashes: dict[str, str] = {}
        self._base = base
        self._entries: dict[str, Any] = {}
        self._writer: PackedWriter | None = None
        self._damage: list[str] = []
        present = gather_from_all_ranks(self.folder.exists())
        if all(present):
            error: Exception | None = None
            try:
                self._open()
            except Exception as caught:
                error = caught
            raise_on_all_ranks(error, f"packed_cache {self.folder}")
        elif not any(present):
            self._writer = PackedWriter(Path(directory), self._key)
        elif own_rank() == 0:
            absent = [rank for rank, there in enumerate(present) if not there]
            warnings.warn(
                f"packed_cache {self.folder}: expected it on the disks of all ranks, found none "
                f"on ranks {absent[:8]}; the base is read instead. Give a shared folder, or copy "
                "the folder to every machine",
                stacklevel=2,
            )

    @property
    def is_complete(self) -> bool:
        """Whether weights are read from the cache."""
        return bool(self._entries)

    def _open(self) -> None:
        index = self.folder / INDEX
        if not index.exists():
            found = sorted(p.name for p in self.folder.iterdir())[:5]
            raise ValueError(f"{self.folder}: expected {INDEX}, got {found}; {_REMEDY}")
        try:
            content = read_index(index)
            key, files, weights = content["key"], content["files"], content["weights"]
            hashes, number = content["hashes"], content["format"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index}: expected the index of a packed base, got a damaged file ({error}); "
                f"{_REMEDY}"
            ) from error
        if number != FORMAT or key != self._key:
            raise ValueError(
                f"{self.folder}: expected the packed base {self._key} in format {FORMAT}, got "
                f"{key} in format {number}, of another base or quantization; {_REMEDY}"
            )
        for name, size in files.items():
            file = self.folder / name
            have = file.stat().st_size if file.exists() else "no file"
            if have != size:
                raise ValueError(f"{file}: expected {size} bytes, got {have}; {_REMEDY}")
        self._entries = weights
        for name in self._base.wanted:
            stored = self._base.name_in_file(name)
            if stored in hashes:
                self.hashes[strip_compile(name)] = hashes[stored]

    # ---- while the base is read

    def fill(self, name: str, module: nn.Module, key: str) -> bool:
        """Copy a packed weight's own rows out of the cache; False if the cache lacks it.

        Damage is noted for `check`: an error here would leave other ranks waiting.
        """
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
                    file = self.folder / piece["file"]
                    target = flat[(low - first) * width : (high - first) * width]
                    try:
                        read_checked(file, piece, (low - start) * width, target)
                    except (OSError, ValueError) as error:
                        self._damage.append(f"{file}, {name!r} ({role}): {error}")
        return True

    def check(self) -> None:
        """Raise if a rank read damaged bytes. Every rank must call it.

        Raises:
            ValueError: on the rank that read them, with the first file and tensor.
            RuntimeError: on the other ranks.
        """
        error = None
        if self._damage:
            more = counted(len(self._damage), "damaged piece")
            error = ValueError(f"{self._damage[0]} ({more} in {self.folder}); {_REMEDY}")
        raise_on_all_ranks(error, f"packed_cache {self.folder}")

    def keep(self, name: str, module: nn.Module, key: str) -> None:
        """Write a packed weight's own rows; replicated tensors are written by rank 0."""
        if self._writer is not None:
            for role, t in _tensors(module, key):
                if is_first_replica(t) if is_sharded(t) else own_rank() == 0:
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
            changed = self._base.stamps() != self._stamps
            problem = "the base's files changed while they were read" if changed else ""
            self._writer.publish(self.folder, known, problem)
            self._writer = None


def _tensors(module: nn.Module, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (role, tensor) of everything that holds a packed weight."""
    for part in storage_of(module, key).iter_tensors(module, key):
        yield part.role, part.tensor


def _key_of(base: BaseFiles, stamps: list[list[str]]) -> str:
    """Return a hash of the base's files and of how its weights are packed.

    Args:
        base: The files.
        stamps: What each rank sees of them. Machines with copies of their own have several stamps.
    """
    seen = sorted({stamp for each in stamps for stamp in each})
    digest = hashlib.sha256(f"format {FORMAT} {seen}".encode())
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
