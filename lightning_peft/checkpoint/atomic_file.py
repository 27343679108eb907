"""Writes checkpoint files that are complete or absent: to a temporary file, synced, then renamed.

One system call exchanges the names of a new and an old folder. Where the file system cannot do that
(NFS), the old folder is renamed first, and `recover` restores it after a crash in between.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.checkpoint.damage import DamagedCheckpointError, damage_of

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

__all__ = [
    "is_local",
    "publish",
    "read",
    "recover",
    "remove",
    "remove_stale",
    "temporary_path",
    "write",
]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
_HOST = socket.gethostname().replace("-", "_") or "host"


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on this machine, rather than an fsspec address."""
    return "://" not in os.fspath(path)


def write(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write like `torch.save`, but never half: the former file stays until the new one is safe.

    Raises:
        OSError: the disk is full, with the bytes needed; the temporary file is gone, the former
            file as it was. Or the path is a directory.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(
            f"{target}: expected the path of a file to write, got a directory; give a file inside "
            f"it, such as {target / 'last.ckpt'}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent)
    temporary = temporary_path(target)
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(data), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        free = shutil.disk_usage(target.parent).free
        temporary.unlink(missing_ok=True)
        if _is_full(error, free, data):
            raise OSError(
                errno.ENOSPC,
                f"{target}: expected {_nbytes(data):,} bytes and more on this disk, got {free:,} "
                "free or a smaller limit per file; the former file is untouched: make room, raise "
                "the limit (ulimit -f), or keep fewer checkpoints (save_top_k)",
            ) from error
        raise
    _sync_directory(target.parent)


def _is_full(error: BaseException, free: int, data: object) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # torch's zip writer turns a failed write into a RuntimeError about positions.
    return isinstance(error, RuntimeError) and min(free, _file_limit()) < _nbytes(data)


def _file_limit() -> float:
    """Return the largest size of a file that this process may write, in bytes."""
    if resource is None:
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _nbytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_nbytes(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_nbytes(v) for v in value)
    return 0


def _sync_directory(directory: Path) -> None:
    """The rename itself must reach the disk."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- one folder in the place of another


def publish(temporary: Path, target: Path) -> None:
    """Replace a file or folder by a finished one. The older is deleted last.

    At every moment one of the two is at `target`, or where `recover` finds it.
    """
    recover(target)
    if not target.exists() or (target.is_file() and temporary.is_file()):
        os.replace(temporary, target)
        _sync_directory(target.parent)
        return
    if _exchange(temporary, target):
        former = temporary
    else:
        former = _aside(target)
        os.replace(target, former)
        os.replace(temporary, target)
    _sync_directory(target.parent)
    remove(former)


def recover(path: str | os.PathLike[str]) -> None:
    """Restore a checkpoint that was set aside when its process died."""
    target = Path(path)
    former = _aside(target)
    if not former.exists():
        return
    if target.exists():
        remove(former)
        return
    try:
        os.replace(former, target)
    except FileNotFoundError:  # another process was first
        return


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _renameat2() -> Any:
    """glibc's function (Linux, glibc 2.28 and later); None elsewhere."""
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names at once; return False where the system or file system cannot.

    Raises:
        OSError: it can, and failed.
    """
    function = _renameat2()
    if function is None:
        return False
    names = [os.fsencode(os.fspath(p)) for p in (a, b)]
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(b))


def temporary_path(target: Path) -> Path:
    """Return the path beside `target` to write to first; it names this process.

    Under SLURM, Lightning reads numbers from every file name with ``ckpt_``. A temporary file must
    not be taken for a checkpoint.
    """
    name = target.name.replace("ckpt_", "ckpt-")
    return target.with_name(f".{name}.tmp-{_HOST}-{os.getpid()}")


def remove_stale(directory: Path) -> None:
    """Delete temporary files and folders of this machine's dead processes, left by kill -9."""
    for file in directory.glob(f".*.tmp-{_HOST}-*"):
        pid = file.name.rpartition("-")[2]
        if pid.isdecimal() and int(pid) != os.getpid() and not _alive(int(pid)):
            remove(file)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """Check the checksums of a file and load it onto the CPU.

    Args:
        path: The file.
        weights_only: If False, objects are unpickled too, which may run code of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or no checkpoint; the newest undamaged one is named.
        UnpicklingError: the file holds objects, and `weights_only` is True.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a checkpoint, found no such file")
    why = damage_of(file)
    if why:
        raise DamagedCheckpointError(file, why)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(file):
            raise _holds_objects(file, error) from error
        raise DamagedCheckpointError(file, "not a torch.save file") from error
    except MemoryError:
        raise
    except Exception as error:  # a malformed pickle raises errors of any kind
        raise DamagedCheckpointError(file, f"{type(error).__name__}: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: expected a checkpoint (a dict), got {type(loaded).__name__}")
    return loaded


def _holds_objects(file: Path, error: Exception) -> pickle.UnpicklingError:
    found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
    what = f"an object of {found.group(1)}" if found else "an object"
    return pickle.UnpicklingError(
        f"{file}: expected plain data, got {what}; if you trust the file, read it with "
        "weights_only=False (of load_from_checkpoint, load_checkpoint, or Trainer.fit). To write "
        "files without objects, leave them out: save_hyperparameters(ignore=[…])"
    )
