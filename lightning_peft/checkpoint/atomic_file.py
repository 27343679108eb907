"""A checkpoint file that is whole or absent: written beside the target, synced, renamed.

A folder takes another's place by exchanging the two names in one system call. Where the file system
cannot do that (NFS), the former one stands aside for a moment, and `recover` puts it back after a
crash in between.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import shutil
import socket
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_local", "publish", "read", "recover", "remove_stale", "write"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
_HOST = socket.gethostname().replace("-", "_") or "host"


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file of this machine, rather than an fsspec address."""
    return "://" not in os.fspath(path)


def write(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """`torch.save` that a crash or a full disk cannot leave half done; the former file stays until
    the new one is safe.

    Raises:
        OSError: the disk is full, with the bytes needed; the temporary file is gone, the former
            file as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent)
    temporary = target.with_name(f".{target.name}.tmp-{_HOST}-{os.getpid()}")
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
                "free; the former file is untouched: make room, or keep fewer checkpoints "
                "(save_top_k)",
            ) from error
        raise
    _sync_directory(target.parent)


def _is_full(error: BaseException, free: int, data: object) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # torch's zip writer turns a failed write into a RuntimeError about positions.
    return isinstance(error, RuntimeError) and free < _nbytes(data)


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
    """Put a finished file or folder in the place of an older one, of either kind; the older goes
    last. At every moment one of the two stands under `target`, or aside where `recover` finds it.
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
    _remove(former)


def recover(path: str | os.PathLike[str]) -> None:
    """Put back a checkpoint that stood aside when its process died."""
    target = Path(path)
    former = _aside(target)
    if not former.exists():
        return
    if target.exists():
        _remove(former)
        return
    try:
        os.replace(former, target)
    except FileNotFoundError:  # another process was first
        return


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def _remove(path: Path) -> None:
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
    """Swap two names at once; False where the system or the file system cannot.

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


def remove_stale(directory: Path) -> None:
    """Delete temporary files of this machine's dead processes: kill -9 never cleans up."""
    for file in directory.glob(f".*.tmp-{_HOST}-*"):
        pid = file.name.rpartition("-")[2]
        if pid.isdecimal() and int(pid) != os.getpid() and not _alive(int(pid)):
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`torch.load(weights_only=True)` onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no checkpoint; the newest other one beside it is named.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a checkpoint, found no such file")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise _unreadable(file, str(error)) from error
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(file):  # whole, but with objects that plain loading refuses
            raise
        raise _unreadable(file, "not a torch.save file") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: expected a checkpoint (a dict), got {type(loaded).__name__}")
    return loaded


def _unreadable(file: Path, why: str) -> ValueError:
    others = [p for p in file.parent.glob(f"*{file.suffix}") if p != file and p.is_file()]
    newest = max(others, key=lambda p: p.stat().st_mtime, default=None)
    advice = (
        f"the newest other checkpoint here is {newest}"
        if newest
        else "no other checkpoint is beside it"
    )
    reason = (why.splitlines() or ["it ends too early"])[0][:120]
    return ValueError(
        f"{file}: expected a whole checkpoint, got one that cannot be read "
        f"({file.stat().st_size:,} bytes: {reason}); {advice}"
    )
