"""Tensors of a released checkpoint as transformers' loader is given them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["dtypes_of", "metadata_of", "open_slices", "shapes_of"]

_OF_EXPERT = re.compile(r"\.experts\.\d+\.")
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def open_slices(files: Sequence[Path], opened: ExitStack) -> dict[str, Any]:
    """Each tensor of the files, read when it is used.

    The files are read, not mapped: mapped pages stay in memory beside the experts that transformers
    stacks from them.
    """
    found = {}
    for file in files:
        handle: Any
        try:
            handle = safe_open(str(file), framework="pt", backend="pread")
        except TypeError:  # safetensors before 0.8
            handle = safe_open(str(file), framework="pt")
        opened.enter_context(handle)
        for key in handle.keys():  # noqa: SIM118  it is no dict
            part = handle.get_slice(key)
            is_scalar = not part.get_shape() and _OF_EXPERT.search(key)
            found[key] = _OneElement(part) if is_scalar else part
    return found


class _OneElement:
    """A scalar of one expert as a vector, so that transformers can concatenate gate's and up's.

    Args:
        scalar: The tensor in the file.
    """

    def __init__(self, scalar: Any) -> None:
        self._scalar = scalar

    def __getitem__(self, where: Any) -> Tensor:
        value: Tensor = self._scalar[...]
        return value.reshape(1)[where]

    def get_shape(self) -> list[int]:
        """[1]."""
        return [1]

    def get_dtype(self) -> str:
        """Dtype in the file."""
        dtype: str = self._scalar.get_dtype()
        return dtype


def metadata_of(files: Sequence[str]) -> dict[str, str]:
    """Return the metadata of all files."""
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            found |= handle.metadata() or {}
    return found


def shapes_of(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in the files."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  it is no dict
                found[key] = tuple(handle.get_slice(key).get_shape())
    return found


def dtypes_of(files: Sequence[str]) -> dict[str, torch.dtype]:
    """Dtype of the tensors in the files, by the last part of their name."""
    found: dict[str, torch.dtype] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  it is no dict
                leaf = key.rpartition(".")[2]
                if leaf not in found:
                    word = handle.get_slice(key).get_dtype()
                    found[leaf] = _DTYPES.get(word, torch.float32)
    return found
