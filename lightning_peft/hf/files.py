"""adapter_model.safetensors: read with every tensor checked, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.hf.config import CONFIG

__all__ = [
    "BATCHES",
    "TENSORS",
    "checked",
    "opened",
    "read_file",
    "read_tensors",
    "require_directory",
    "write_adapter",
    "write_tensors",
]

TENSORS = "adapter_model.safetensors"
BATCHES = "num_batches_tracked"  # of a BatchNorm in modules_to_save, an integer
_MOST_AXES = 8  # a convolution in three dimensions over experts has 6
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)  # peft takes the smallest


def read_tensors(directory: Path, integers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return all tensors of the file, on the CPU.

    Args:
        directory: The adapter directory.
        integers: Last parts of the keys whose tensors hold integers.

    Raises:
        FileNotFoundError: no adapter_model.safetensors.
        ValueError: a pickle, a truncated or corrupt file, an integer or non-finite tensor.
    """
    path = directory / TENSORS
    if not path.is_file():
        pickled = sorted(p.name for p in directory.glob("adapter_model.*"))
        if pickled:
            raise ValueError(
                f"{directory}: expected {TENSORS}, found {', '.join(pickled)}; a pickle can run "
                "any code when it is read: convert it where you trust it "
                "(safetensors.torch.save_file(torch.load(path, weights_only=True), ...))"
            )
        raise FileNotFoundError(f"{directory}: expected {TENSORS}, found none")
    return read_file(path, (*integers, BATCHES))[0]


def read_file(path: Path, integers: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        ValueError: a truncated or corrupt file, an integer or non-finite tensor.
    """
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return checked(tensors, str(path), integers), metadata


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file of an adapter.

    Raises:
        ValueError: a truncated or corrupt file.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except MemoryError:
        raise
    except Exception as error:  # dtypes and shapes that torch lacks raise errors of many kinds
        raise ValueError(
            f"{path}: expected a whole safetensors file, got {path.stat().st_size:,} bytes that do "
            f"not read as one ({str(error)[:200]}); copy it again"
        ) from None


def require_directory(directory: Path, what: str) -> None:
    """Raise FileExistsError if a directory cannot be there, because it or a parent is a file."""
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not place.is_dir():
        raise FileExistsError(
            f"{what}: expected a directory to write to, got {directory}, where {place} is a file; "
            "remove it, or write elsewhere"
        )


def checked(
    tensors: Mapping[str, Tensor], source: str, integers: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors, detached, on the CPU.

    Raises:
        ValueError: a value that is no tensor, an integer tensor, or a non-finite one.
    """
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: {key}: expected a tensor, got {type(value).__name__}")
        tensor = value.detach().cpu()
        if tensor.ndim > _MOST_AXES:
            raise ValueError(
                f"{source}: {key}: expected at most {_MOST_AXES} axes, got {tensor.ndim}"
            )
        if key.endswith(tuple(f".{name}" for name in integers)):
            if tensor.dtype not in _INTEGERS:
                raise ValueError(
                    f"{source}: {key}: expected uint8, int16, int32 or int64, got {tensor.dtype}"
                )
            found[key] = tensor
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {key}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dtype.itemsize == 1:
            raise ValueError(f"{source}: {key}: expected 16 bits or more, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{source}: {key}: expected finite values, got {bad} NaN or infinite of "
                f"{tensor.numel()}; the adapter was not finite when it was written: take an "
                "earlier one"
            )
        found[key] = tensor
    return found


def write_adapter(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    readme: str,
    metadata: Mapping[str, str],
) -> None:
    """Write the three files, each atomically; the config comes last.

    Args:
        directory: Created if absent.
        config: As in adapter_config.json.
        tensors: As in adapter_model.safetensors.
        readme: Text of README.md, which is kept if there is one.
        metadata: Header of the safetensors file, which other programs ignore.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_tensors(directory / TENSORS, tensors, metadata)
    if not (directory / "README.md").exists():
        _replace(directory / "README.md", readme.encode())
    _replace(directory / CONFIG, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in sorted(tensors.items())}
    _replace(path, save(plain, metadata={"format": "pt", **metadata}))


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
