"""A model directory of safetensors, written one tensor at a time, complete or absent.

Shapes and dtypes are known before the first tensor, so headers and shards are laid out first and
the tensors follow in order.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["DTYPES", "PlannedTensor", "parse_size", "write_directory"]

#: Names of dtypes in safetensors files.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        name: Its key.
        dtype: Dtype that it is written in.
        shape: Its shape.
        form: Returns the tensor; called once, when its turn comes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    form: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def parse_size(text: str | int) -> int:
    """Return bytes for a size such as ``"5GB"`` (10⁹) or ``"500MB"``.

    Raises:
        ValueError: another form, or zero.
    """
    if isinstance(text, int) and text > 0:
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text).upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= 0:
        raise ValueError(f"shard_size: expected a size such as '5GB' or '500MB', got {text!r}")
    return size


def write_directory(
    out: Path,
    tensors: Sequence[PlannedTensor],
    shard_size: int,
    fill: Callable[[Path], None],
    progress: Callable[[Iterable[PlannedTensor]], Iterable[PlannedTensor]],
) -> None:
    """Write shards and their index into a new directory; it appears when it is complete.

    Args:
        out: The directory; absent or empty.
        tensors: The tensors, in order.
        shard_size: Most bytes per file, except for a file of one larger tensor.
        fill: Adds further files, given the temporary directory.
        progress: Wraps the iteration over the tensors.

    Raises:
        OSError: the disk is too full; nothing is left behind.
    """
    _check_space(out, sum(t.nbytes for t in tensors))
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out)))
    owner = temporary / "pid"
    try:
        owner.write_text(str(os.getpid()))
        shards = _shards(tensors, shard_size)
        _write_shards(temporary, shards, progress(tensors))
        if len(shards) > 1:
            _write_index(temporary, shards)
        fill(temporary)
        owner.unlink()
        temporary.chmod(0o755)
        if out.is_dir():
            out.rmdir()  # empty: `os.replace` could do it on POSIX alone
        os.replace(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _full(out, sum(t.nbytes for t in tensors)) from error
        raise


def _prefix(out: Path) -> str:
    return f".{out.name}.export-"


def _remove_stale(out: Path) -> None:
    """Remove what an export that was killed has left."""
    for path in out.parent.glob(f"{_prefix(out)}*"):
        owner = path / "pid"
        if owner.is_file() and not _runs(owner.read_text()):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _check_space(out: Path, needed: int) -> None:
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if shutil.disk_usage(parent).free < needed:
        raise _full(out, needed)


def _full(out: Path, needed: int) -> OSError:
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    return OSError(
        errno.ENOSPC,
        f"{out}: expected {needed:,} bytes and more on this disk, got {free:,} free; nothing was "
        "written: make room, or export elsewhere",
    )


def _shards(tensors: Sequence[PlannedTensor], most: int) -> dict[str, list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shards(
    directory: Path, shards: dict[str, list[PlannedTensor]], order: Iterable[PlannedTensor]
) -> None:
    remaining = iter(order)
    for name, group in shards.items():
        with open(directory / name, "wb") as file:
            file.write(_header(group))
            for _ in group:
                _write_tensor(file, next(remaining))
            file.flush()
            os.fsync(file.fileno())
    next(remaining, None)  # ends the progress bar


def _header(group: Sequence[PlannedTensor]) -> bytes:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in group:
        end = start + tensor.nbytes
        described[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, planned: PlannedTensor) -> None:
    tensor = planned.form()
    if tuple(tensor.shape) != planned.shape:
        raise RuntimeError(
            f"{planned.name}: expected shape {list(planned.shape)}, got {list(tensor.shape)}"
        )
    data = tensor.detach().to("cpu", planned.dtype).contiguous()
    if data.numel():
        file.write(data.reshape(-1).view(torch.uint8).numpy().data)


def _write_index(directory: Path, shards: dict[str, list[PlannedTensor]]) -> None:
    index = {
        "metadata": {"total_size": sum(t.nbytes for group in shards.values() for t in group)},
        "weight_map": {t.name: name for name, group in shards.items() for t in group},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, "utf-8")
