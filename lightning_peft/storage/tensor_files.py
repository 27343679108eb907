"""A folder of safetensors, read row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import Protocol

from torch import Tensor

__all__ = ["RowSource", "TensorFiles"]


class RowSource(Protocol):
    """A tensor in a file or in memory, which is sliced."""

    def __getitem__(self, where: int | slice | EllipsisType | tuple[slice, ...], /) -> Tensor:
        """Read a part; all of it for ``...``."""


class TensorFiles:
    """The tensors of a folder.

    Attributes:
        keys: Name of a tensor → (file, shape).
        dtypes: Name of a tensor → its dtype as safetensors writes it, such as ``"BF16"``.
        files: The files, in order.

    Raises:
        FileNotFoundError: no safetensors there, or a listed file is missing.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.keys: dict[str, tuple[Path, tuple[int, ...]]] = {}
        self.dtypes: dict[str, str] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: expected *.safetensors, found none")
        listed = folder / "model.safetensors.index.json"
        if listed.exists():
            told = _listed_files(listed)
            files = [f for f in files if f.name in told]
            absent = told - {f.name for f in files}
            if absent:
                raise FileNotFoundError(f"{folder}: expected {sorted(absent)}, found none")
        self.files: list[Path] = files
        for file in files:
            with safe_open(str(file), framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  it is no dict
                    rows = handle.get_slice(key)
                    self.keys[key] = (file, tuple(rows.get_shape()))
                    self.dtypes[key] = rows.get_dtype()

    def stamps(self) -> list[str]:
        """Return the name, size, time of the last change and a hash of the header of each file.

        A file whose values were changed has another stamp, unless its time was set back.
        """
        found = []
        for file in self.files:
            state = file.stat()
            with file.open("rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header = hashlib.sha256(handle.read(size)).hexdigest()
            found.append(f"{file.name} {state.st_size} {state.st_mtime_ns} {header}")
        return found

    @contextmanager
    def open(self, key: str) -> Iterator[RowSource]:
        """Context with the rows of one tensor; the file is mapped only while it is read."""
        from safetensors import safe_open

        with safe_open(str(self.keys[key][0]), framework="pt") as handle:
            yield handle.get_slice(key)


def _listed_files(index: Path) -> set[str]:
    """Return the names of the files that an index lists.

    Raises:
        ValueError: no JSON with a ``weight_map``.
    """
    try:
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: expected JSON with a weight_map, got something else ({error}); download it "
            "again"
        ) from None
