"""The files of a base, matched to the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import persistent_buffers
from lightning_peft.core.names import counted, in_adapter, join
from lightning_peft.storage.registry import held_tensors, storage_of
from lightning_peft.storage.tensor_files import RowSource, TensorFiles

__all__ = ["BaseFiles", "stored_tensor"]

_VALUES = ("F64", "F32", "F16", "BF16")  # dtypes of weights; others are codes without their scales


def _whole_files(folder: Path) -> TensorFiles:
    """Open the tensors of a folder.

    Raises:
        ValueError: a file that is cut off.
    """
    from safetensors import SafetensorError

    try:
        return TensorFiles(folder)
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: expected whole safetensors files, got one that cannot be read ({error}); "
            "download it again"
        ) from None


def _is_floating(module: nn.Module, key: str) -> bool:
    """Whether a tensor of the base has values of weights, also where it is packed."""
    return storage_of(module, key).is_quantized or stored_tensor(module, key).is_floating_point()


class BaseFiles:
    """The files of a base, matched to the tensors of a model.

    Attributes:
        folder: The folder.
        wanted: (module, key) of every base tensor, by name in the model.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: tensors are missing, have another shape or hold codes, with the list; or a file
            is cut off.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.folder = folder
        self._index = _whole_files(folder)
        self.wanted = dict(_wanted(model))
        self._prefix = _prefix(model, self._index.keys, self.wanted)
        problems = []
        for name, place in self.wanted.items():
            found, shape = (
                self._index.keys.get(self.name_in_file(name)),
                list(_natural_shape(*place)),
            )
            if found is None:
                problems.append(f"{name}: missing")
            elif list(found[1]) != shape:
                problems.append(f"{name}: expected shape {shape}, got {list(found[1])}")
            elif (
                _is_floating(*place)
                and (dtype := self._index.dtypes[self.name_in_file(name)]) not in _VALUES
            ):
                problems.append(
                    f"{name}: expected weights in {list(_VALUES)}, got codes in {dtype}"
                )
        if problems:
            raise ValueError(
                f"{folder}: expected the {len(self.wanted)} tensors of this model's base, got "
                f"{counted(len(problems), 'difference')}; nothing was read:\n  "
                + "\n  ".join(problems[:12])
            )

    def name_in_file(self, name: str) -> str:
        """Return the name in the files of a tensor of the model."""
        return name.removeprefix(self._prefix)

    def shape_in_file(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in its file."""
        return self._index.keys[self.name_in_file(name)][1]

    def stamps(self) -> list[str]:
        """Return the stamps of the files, which change with a file: see `TensorFiles.stamps`."""
        return self._index.stamps()

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Context that adds the file and the tensor to an error about a tensor's values."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            stored = self.name_in_file(name)
            place = f"base_from {self._index.keys[stored][0]}, {stored!r}"
            error.args = (f"{place}: {error}", *error.args[1:])
            raise

    def open(self, name: str) -> AbstractContextManager[RowSource]:
        """Context with the rows of one tensor, by its name in the model."""
        return self._index.open(self.name_in_file(name))


def _wanted(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Base parameters and persistent buffers, each tensor once; companions of a quantised weight
    are left out.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if in_adapter(name):
            continue
        derived = {k for k, held in held_tensors(module).items() if k != held.weight}
        own = {**module._parameters, **persistent_buffers(module, recurse=False)}
        for key, t in own.items():
            if t is not None and key not in derived and id(t) not in seen:
                seen.add(id(t))
                yield join(name, key), (module, key)


def stored_tensor(module: nn.Module, key: str) -> Tensor:
    """Return a parameter or buffer that `BaseFiles.wanted` lists, as it is held."""
    t = module._parameters.get(key)
    found = module._buffers[key] if t is None else t
    assert found is not None  # listed by `_wanted`
    return found


def _natural_shape(module: nn.Module, key: str) -> torch.Size:
    storage = storage_of(module, key)
    return storage.shape(module, key) if storage.is_quantized else stored_tensor(module, key).shape


def _prefix(model: nn.Module, keys: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the prefix of the submodule whose names the files use: the one with most hits."""
    candidates = ["", *(f"{n}." for n, _ in model.named_modules() if n and n.count(".") < 3)]
    hits = {c: sum(n.startswith(c) and n[len(c) :] in keys for n in wanted) for c in candidates}
    return max(candidates, key=lambda c: hits[c])
