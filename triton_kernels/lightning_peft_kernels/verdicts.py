"""Verdicts on kernels, as the check on a device found them, kept in a file per device and software.

A verdict holds for one GPU model, driver, torch, Triton and one state of the kernel sources. A file
that cannot be read, or that belongs to something else, counts as absent: its kernels are unchecked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

__all__ = ["Verdict", "device_key", "file_of", "read_verdicts", "store_verdicts", "verdict_lock"]

Key = dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """What the check found for one kernel.

    Attributes:
        op: Name of the op.
        configuration: Which of its kernels, as `dispatch.configuration` names it.
        outcome: ``"ok"``; ``"wrong"`` numbers; ``"refused"`` by the compiler or the device;
            ``"crashed"``: its process ended.
        detail: Error against the reference, or the message.
        microseconds: Median time of a call; 0 if it was not taken.
    """

    op: str
    configuration: str
    outcome: Literal["ok", "wrong", "refused", "crashed"]
    detail: str
    microseconds: float = 0.0


def device_key(device: torch.device) -> Key:
    """Return what a verdict depends on besides op and configuration."""
    key = {
        "device": "cpu, interpreted",
        "capability": "",
        "driver": "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sources": _hash_of_sources(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        architecture = getattr(properties, "gcnArchName", "")
        driver = getattr(torch._C, "_cuda_getDriverVersion", int)
        key["device"] = properties.name
        key["capability"] = architecture or f"{properties.major}.{properties.minor}"
        key["driver"] = str(driver())
    return key


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def _hash_of_sources() -> str:
    """Return a hash of every source file of this package."""
    spec = importlib.util.find_spec(__name__.partition(".")[0])
    assert spec is not None  # this module is part of it
    (root,) = map(Path, spec.submodule_search_locations or ())
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def file_of(key: Key) -> Path:
    """Return the file of a key, in ``$LIGHTNING_PEFT_CACHE`` or the user's cache folder."""
    folder = os.environ.get("LIGHTNING_PEFT_CACHE")
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(home) / "lightning_peft")
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"kernels-{name}.json"


def read_verdicts(key: Key) -> dict[tuple[str, str], Verdict]:
    """Return the verdicts stored for a key, by op and configuration."""
    path = file_of(key)
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["key"] != key:
            raise ValueError(f"it belongs to {stored['key']}")
        found = [Verdict(**entry) for entry in stored["verdicts"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"{path}: expected verdicts on kernels for {key['device']}, got a file that cannot be "
            f"used ({error}); its kernels count as unchecked. Delete it and run "
            "`python -m lightning_peft check`.",
            stacklevel=2,
        )
        return {}
    return {(verdict.op, verdict.configuration): verdict for verdict in found}


def store_verdicts(key: Key, found: Mapping[tuple[str, str], Verdict]) -> str:
    """Replace the file of a key; return why it could not be written, or "".

    Hold `verdict_lock` from reading to storing, so that two processes lose nothing.
    """
    path = file_of(key)
    text = json.dumps({"key": key, "verdicts": [asdict(v) for v in found.values()]}, indent=1)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        return f"{path}: not written: {error.strerror or error}"
    return ""


@contextmanager
def verdict_lock(key: Key) -> Iterator[None]:
    """Wait until no other process of this machine checks the same key; hold others off.

    Does nothing where the folder cannot be written or the system has no file locks.
    """
    path = file_of(key).with_suffix(".lock")
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except (ImportError, OSError):
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
