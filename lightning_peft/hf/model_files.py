"""A model directory of safetensors, read one tensor at a time.

A file is opened per tensor and closed again: its pages leave memory with the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.hf.recognise import named

__all__ = ["ModelFiles", "StoredShape"]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredShape:
    """Place, dtype and shape of a tensor in a file.

    Attributes:
        file: The file that holds it.
        dtype: Dtype by the name that safetensors uses, for instance ``"BF16"``.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


class ModelFiles:
    """The tensors of a model directory.

    Args:
        directory: Holds ``*.safetensors``, with ``model.safetensors.index.json`` if the model is
            sharded.

    Attributes:
        tensors: Shape and place by name, in the order of the files.

    Raises:
        FileNotFoundError: no such directory, no safetensors in it, or missing shards.
        ValueError: a file that is cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredShape] = {}
        for file in self._files():
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    self.tensors[name] = StoredShape(file, part.get_dtype(), (*part.get_shape(),))
        self._check_complete()

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU."""
        with _opened(self.tensors[name].file) as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def _files(self) -> list[Path]:
        if not self.directory.is_dir():
            raise FileNotFoundError(
                f"{self.directory}: expected the directory of a model, found no such directory"
            )
        listed = sorted({self.directory / file for file in self._index().values()})
        missing = [file.name for file in listed if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.directory}: expected the {len(listed)} shards of {_INDEX}, found "
                f"{len(listed) - len(missing)}; missing: {', '.join(missing[:5])}; download them "
                "again"
            )
        files = listed or sorted(self.directory.glob("model*.safetensors"))
        if not files:
            names = named(self.directory) or ", ".join(sorted(_names(self.directory))[:8])
            raise FileNotFoundError(
                f"{self.directory}: expected the .safetensors files of a model, found "
                f"{names or 'an empty directory'}; save the model with save_pretrained"
            )
        return files

    def _index(self) -> Mapping[str, str]:
        path = self.directory / _INDEX
        if not path.is_file():
            return {}
        try:
            weight_map: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected JSON with a weight_map, got something else ({error}); download "
                "it again"
            ) from None
        return weight_map

    def _check_complete(self) -> None:
        missing = sorted(set(self._index()) - set(self.tensors))
        if missing:
            raise ValueError(
                f"{self.directory}: expected the tensors that {_INDEX} lists, found none for "
                f"{missing[:3]} and {max(0, len(missing) - 3)} more; download the shards again"
            )


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: the file is cut short, or is something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: expected a complete safetensors file, got {file.stat().st_size:,} bytes "
            f"that do not read as one ({error}); download it again"
        ) from None
