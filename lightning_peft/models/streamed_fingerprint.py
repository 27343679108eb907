"""Fingerprint of a base that is read in parts, from values that are read in any case.

A model on the meta device has no values when adapters are attached, so its fingerprint holds names
and shapes alone. While the files are read, each rank keeps the sampled values of its own rows. One
reduction joins the samples of all ranks; the result equals the fingerprint of a dense model.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from types import EllipsisType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.core.collectives import raise_on_all_ranks
from lightning_peft.core.names import join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.models.fingerprint import hash_of_samples, sample_positions
from lightning_peft.storage.tensor_files import RowSource

__all__ = ["FingerprintSampler"]

_PEEKS = 2  # values per tensor that a rank also reads from rows of other ranks

_Index = int | slice | EllipsisType | tuple[slice, ...]


class _Samples:
    """Sampled values of one tensor, as far as this rank has read them.

    Attributes:
        values: One value per position, in the dtype of the model's parameter; 0 where not read.
        peeked: Values by number of the sample that were read to compare files between ranks.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        positions = sample_positions(torch.Size(shape).numel())
        self.coordinates = torch.unravel_index(positions, self.shape) if self.shape else ()
        self.values = torch.zeros(len(positions), dtype=dtype)
        self.peeked: dict[int, Tensor] = {}

    def take(self, part: Tensor, where: _Index) -> None:
        """Keep the samples that lie in a part of the tensor."""
        if not self.shape:
            self.values.copy_(part.reshape(1))
            return
        starts, extents = self._box(where)
        inside = torch.ones(len(self.values), dtype=torch.bool)
        places = []
        for c, start, extent in zip(self.coordinates, starts, extents, strict=True):
            inside &= (c >= start) & (c < start + extent)
            places.append(c - start)
        if inside.any():
            box = part.detach().to("cpu").reshape(extents)
            self.values[inside] = box[tuple(c[inside] for c in places)].to(self.values.dtype)

    def _box(self, where: _Index) -> tuple[list[int], list[int]]:
        """Return the first index and the extent of a part along every axis."""
        given: tuple[int | slice, ...]
        if isinstance(where, EllipsisType):
            given = ()
        else:
            given = where if isinstance(where, tuple) else (where,)
        starts, extents = [], []
        for axis, size in enumerate(self.shape):
            index = given[axis] if axis < len(given) else slice(None)
            if isinstance(index, int):
                index = slice(index, index + 1)
            start, stop, _ = index.indices(size)
            starts.append(start)
            extents.append(stop - start)
        return starts, extents

    def peek(self, source: RowSource, first: int) -> None:
        """Read single values from the file, whoever holds their rows."""
        n = len(self.values)
        for i in {(first + k * (n // _PEEKS + 1)) % n for k in range(min(_PEEKS, n))}:
            if self.shape:
                where = tuple(slice(int(c[i]), int(c[i]) + 1) for c in self.coordinates)
                self.peeked[i] = source[where].reshape(()).to(self.values.dtype)


class _Sampled:
    """Rows of a tensor that are sampled as they are read."""

    def __init__(self, source: RowSource, samples: _Samples) -> None:
        self._source, self._samples = source, samples

    def __getitem__(self, where: _Index) -> Tensor:
        part = self._source[where]
        self._samples.take(part, where)
        return part


class FingerprintSampler:
    """Completes the fingerprints of an attached model while its base is read.

    Args:
        model: The model, with adapters attached and the base on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        trained = {
            strip_compile(join(name, path))
            for name, adapted in adapted_modules(model)
            for adapter in adapters_of(adapted)
            for path in adapter.copies()
        }
        self._entries: dict[str, list[list[object]]] = {}
        for prefix, _, registry in registries_in(model):
            for name, entry in (registry.fingerprint or {"tensors": {}})["tensors"].items():
                full = strip_compile(join(prefix, name))
                if full not in trained:
                    self._entries.setdefault(full, []).append(entry)
        self._samples: dict[str, _Samples] = {}
        self._known: dict[str, str] = {}

    def around(self, name: str, shape: Sequence[int], source: RowSource) -> RowSource:
        """Return the rows of a tensor in a form that notes samples.

        Args:
            name: Name of the tensor in the model.
            shape: Its shape in the file.
            source: Its rows.
        """
        plain = strip_compile(name)
        entries = self._entries.get(plain)
        if not entries or 0 in shape:
            return source
        dtype = getattr(torch, str(entries[0][1]).removeprefix("torch."))
        samples = self._samples[plain] = _Samples(shape, dtype)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            samples.peek(source, zlib.crc32(plain.encode()) + dist.get_rank())
        return _Sampled(source, samples)

    def finish(self, device: torch.device) -> None:
        """Join the samples of all ranks and write the hashes into the fingerprints.

        Every rank must call it.

        Args:
            device: A device that the process group can reduce on.

        Raises:
            RuntimeError: on every rank; ranks read files with different values.
        """
        differing = self._join(device)
        error = None
        if differing:
            error = RuntimeError(
                f"base_from: expected the same files on every machine, got other values in "
                f"{len(differing)} of {len(self._samples)} tensors ({', '.join(differing[:3])}); "
                "copy one base to all machines, or give a shared folder"
            )
        raise_on_all_ranks(error, "base_from")
        self._known |= {n: hash_of_samples(s.values) for n, s in self._samples.items()}
        for name, content in self._known.items():
            for entry in self._entries.get(name, ()):
                entry[2] = content

    def take(self, known: Mapping[str, str]) -> None:
        """Take hashes that were computed when the base was read before."""
        self._known |= known

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes by canonical name, after `finish`."""
        return dict(self._known)

    def _join(self, device: torch.device) -> list[str]:
        """Reduce the samples; return the tensors of which this rank's files hold other values."""
        if not self._samples or not (dist.is_available() and dist.is_initialized()):
            return []
        parts = [s.values.view(torch.uint8) for s in self._samples.values()]
        joined = torch.cat(parts).to(device)
        # Bytes are zero where a rank did not read them, so the maximum is the byte that was read.
        dist.all_reduce(joined, dist.ReduceOp.MAX)
        pieces = joined.cpu().split([part.numel() for part in parts])
        differing = []
        for (name, samples), piece in zip(self._samples.items(), pieces, strict=True):
            samples.values = piece.clone().view(samples.values.dtype)
            read = samples.values.view(torch.uint8).view(len(samples.values), -1)
            for i, value in samples.peeked.items():
                if not torch.equal(read[i], value.reshape(1).view(torch.uint8)):
                    differing.append(name)
                    break
        return differing
