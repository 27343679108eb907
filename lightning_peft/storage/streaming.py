"""A base read from safetensors row by row into a model built on the meta device.

Each process reads its own rows only, a few at a time, and quantises them on the way; no process
ever holds more of the dense model than one chunk. Bytes are those of quantising the whole weight.
A start that needs a weight whole (PiSSA, DoRA's norms) is given it right when its rows were read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_peft.storage.base_files import BaseFiles, stored_tensor
from lightning_peft.storage.dtensor import local, local_rows
from lightning_peft.storage.nf4.storage import FourBitStorage
from lightning_peft.storage.nf4.streaming import stream_packed
from lightning_peft.storage.registry import storage_of
from lightning_peft.storage.tensor_files import RowSource

__all__ = ["After", "Cache", "Through", "stream_base"]

#: (module, name of the weight, how to read it whole) → the weight to store in its place, or None.
After = Callable[[nn.Module, str, Callable[[], Tensor]], Tensor | None]
#: (name of the weight, its shape in the file, its rows) → rows that are watched as they are read.
Through = Callable[[str, Sequence[int], RowSource], RowSource]

_CHUNK = 1 << 22  # elements read at once: 16 MB in fp32


class Cache(Protocol):
    """Packed weights that need not be quantised again."""

    def fill(self, name: str, module: nn.Module, key: str) -> bool:
        """Copy a packed weight in; False if it is not there."""

    def keep(self, name: str, module: nn.Module, key: str) -> None:
        """Note a weight that was packed."""


def stream_base(
    model: nn.Module,
    base: Path | BaseFiles,
    *,
    chunk: int = _CHUNK,
    after: After | None = None,
    through: Through | None = None,
    cache: Cache | None = None,
) -> None:
    """Fill the base of `model` (adapters left out) from a folder of safetensors.

    Args:
        model: With memory for its own rows; sharded or not, packed or dense.
        base: The files, or their folder. It holds ``*.safetensors``; names are the model's, or
            those of one submodule.
        chunk: Elements of a dense weight read at once.
        after: Called when a weight's rows are in place, on every process in the same order; what
            it returns is stored instead.
        through: Wraps the rows of each weight, for instance to note a fingerprint.
        cache: Where packed weights are looked up, and noted after they were packed.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: tensors are missing or have another shape, with the list; nothing is read. Or
            values that cannot be packed, with the file and the tensor.
    """
    files = base if isinstance(base, BaseFiles) else BaseFiles(model, base)
    with torch.no_grad():
        for name, (module, key) in files.wanted.items():
            with files.naming(name), files.open(name) as rows:
                source = rows
                packed = cache is not None and storage_of(module, key).is_quantized
                if cache is None or not packed or not cache.fill(name, module, key):
                    if through is not None:
                        source = through(name, files.shape_in_file(name), rows)
                    _fill(module, key, source, chunk)
                    if cache is not None and packed:
                        cache.keep(name, module, key)
                other = None if after is None else after(module, key, partial(_whole, source))
                if other is not None:
                    _fill(module, key, other, chunk)


def _fill(module: nn.Module, key: str, source: RowSource, chunk: int) -> None:
    """Write one weight from `source`, a tensor in a file or in memory, which is sliced."""
    storage = storage_of(module, key)
    if isinstance(storage, FourBitStorage):
        stream_packed(module, key, source, chunk)
    elif storage.is_quantized:
        storage.write(module, key, source[...].to(storage.dtype(module, key)))
    else:
        _stream_dense(stored_tensor(module, key), source, chunk)


def _whole(source: RowSource) -> Tensor:
    return source[...]


def _stream_dense(t: Tensor, source: RowSource, chunk: int) -> None:
    first, rows = local_rows(t)
    own = local(t.detach())
    if not t.ndim:
        own.copy_(source[...])
        return
    # A slice of a DTensor would gather the complete weight on every rank.
    step = max(1, chunk // max(1, t.shape[1:].numel()))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        own[start:stop].copy_(source[first + start : first + stop])
