"""Weights of a model in memory or in safetensors files, read singly by another model's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.hf.legacy_names import namings
from lightning_peft.hf.recognise import named
from lightning_peft.hf.targets import model_root
from lightning_peft.storage import held_tensors, storage_of

__all__ = ["Weight", "Weights", "opened"]


@dataclass(frozen=True)
class Weight:
    """A tensor's natural shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """Readable tensors by name.

    Attributes:
        label: For messages.
        tensors: Everything there is.
    """

    label: str
    tensors: Mapping[str, Weight]

    def under_names_of(self, model: nn.Module, wanted: Sequence[str]) -> dict[str, Weight]:
        """Return the available tensors by the parameter names of `model`.

        Names may differ in what stands before all of them, and may be those that transformers gave
        the layers before release 5 (it still writes them).

        Args:
            model: Whose names are used.
            wanted: Parameters that must be there.

        Raises:
            ValueError: one of them is not, under any naming.
        """
        tied_too = model.named_parameters(remove_duplicate=False)
        parameters = {n for n, _ in tied_too if not in_adapter(n)}
        parameters |= set(wanted)
        best: list[str] = list(wanted)
        for naming in (dict[str, str](), *_old_parameters(model, parameters)):
            for theirs in self._spellings(wanted, naming):
                missing = [n for n in wanted if theirs(n) not in self.tensors]
                if not missing:
                    found = {n: self.tensors.get(theirs(n)) for n in parameters}
                    return {n: t for n, t in found.items() if t is not None}
                best = min(best, missing, key=len)
        raise ValueError(
            f"{self.label}: expected the weights of {type(model).__name__}, found none for "
            f"{len(best)} of {len(wanted)}, as {best[:3]}; its own are named "
            f"{list(self.tensors)[:3]}"
        )

    def _spellings(
        self, wanted: Sequence[str], naming: Mapping[str, str]
    ) -> Iterator[Callable[[str], str]]:
        """Return the possible differences of name prefixes, from the first name."""
        first = naming.get(wanted[0], wanted[0])
        for key in self.tensors:
            if key == first or key.endswith(f".{first}"):
                more = key[: -len(first)]
                yield lambda n, more=more: f"{more}{naming.get(n, n)}"  # type: ignore[misc]
            elif first.endswith(f".{key}"):
                less = first[: -len(key)]
                yield lambda n, less=less: naming.get(n, n).removeprefix(less)  # type: ignore[misc]


def _old_parameters(model: nn.Module, parameters: set[str]) -> Iterator[dict[str, str]]:
    prefix, top = model_root(model)
    for naming in namings(top):
        names = {join(prefix, n): join(prefix, old) for n, old in naming.items()}
        yield {
            p: f"{names[p.rpartition('.')[0]]}.{p.rpartition('.')[2]}"
            for p in parameters
            if p.rpartition(".")[0] in names
        }


@contextmanager
def opened(source: nn.Module | str | Path) -> Iterator[Weights]:
    """Yield a model's weights. Files stay open inside the block.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: a pickle, or a file that is no whole model.
    """
    if isinstance(source, nn.Module):
        yield Weights(type(source).__name__, dict(_in_memory(source)))
        return
    from safetensors import SafetensorError, safe_open

    path = Path(source)
    with ExitStack() as stack:
        tensors: dict[str, Weight] = {}
        for file in _files(path):
            try:
                handle = stack.enter_context(safe_open(file, "pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file}: expected a whole safetensors file, got one that does not read as one "
                    f"({error}); copy it again"
                ) from None
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(handle.get_slice(name).get_shape())
                tensors[name] = Weight(shape, _reader(handle, name))
        yield Weights(str(path), tensors)


def _reader(handle: Any, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    return read


def _files(path: Path) -> list[Path]:
    if path.suffix == ".safetensors" and path.is_file():
        return [path]
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if found and not any(f.name.startswith("adapter") for f in found):
        return found
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a .safetensors file or a directory, found none")
    raise ValueError(
        f"{path}: expected the .safetensors files of a whole model, found "
        f"{named(path) or ', '.join(p.name for p in found) or 'none'}; nothing was read"
    )


def _in_memory(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    for name, module in model.named_modules():
        if in_adapter(name):
            continue
        quantized = held_tensors(module)
        for leaf, p in module._parameters.items():
            if p is None:
                continue
            if leaf not in quantized:
                if p.is_floating_point():
                    yield join(name, leaf), Weight(tuple(p.shape), p.detach)
            elif leaf == quantized[leaf].weight:
                shape = tuple(quantized[leaf].storage.shape(module, leaf))
                yield join(name, leaf), Weight(shape, _dequantized(module, leaf))


def _dequantized(module: nn.Module, leaf: str) -> Callable[[], Tensor]:
    return lambda: storage_of(module, leaf).read(module, leaf, torch.float32)
