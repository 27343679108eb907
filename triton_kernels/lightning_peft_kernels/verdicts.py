"""Verdicts on kernels, as the check on a device found them, kept in a file per device and software.

A verdict holds for one GPU model, driver, torch, Triton and one state of the kernel sources. A file
that cannot be read, or that belongs to something else, counts as absent: its kernels are unchecked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from lightning_peft_kernels.cache_entries import entry_of, expect, is_time

__all__ = [
    "Key",
    "Verdict",
    "device_key",
    "file_of",
    "read_entries",
    "read_verdicts",
    "store_entries",
    "store_verdicts",
    "verdict_lock",
]

T = TypeVar("T")
Key = dict[str, str]
Kind = Literal["kernels", "races"]
# Kind of file → name of its list.
_FIELDS: dict[Kind, str] = {"kernels": "verdicts", "races": "races"}
_OUTCOMES = ("ok", "wrong", "refused", "crashed", "unchecked")
# Warnings that were given: one per damaged file, however often it is read.
_WARNED: set[str] = set()


@dataclass(frozen=True)
class Verdict:
    """What the check found for one kernel; ValueError for a value of another type or range.

    Attributes:
        op: Name of the op.
        configuration: Which of its kernels, as `dispatch.configuration` names it.
        outcome: ``"ok"``; ``"wrong"`` numbers; ``"refused"`` by the compiler or the device;
            ``"crashed"``: its process ended; ``"unchecked"``: it could not be tried (no memory, no
            compiler), which says nothing about the kernel and is not stored.
        detail: Error against the reference, or the message.
        microseconds: Median time of a call; 0 if it was not taken.
    """

    op: str
    configuration: str
    outcome: Literal["ok", "wrong", "refused", "crashed", "unchecked"]
    detail: str
    microseconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("op", "configuration", "detail"):
            value = getattr(self, name)
            expect(name, value, isinstance(value, str), "a string")
        expect("outcome", self.outcome, self.outcome in _OUTCOMES, f"one of {_OUTCOMES}")
        time = self.microseconds
        expect("microseconds", time, is_time(time), "a finite number of at least 0")


def device_key(device: torch.device) -> Key:
    """Return what a verdict depends on besides op and configuration."""
    key = {
        "device": f"cpu, {_cpu_name()}",
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


@cache
def _cpu_name() -> str:
    """Return the model of the CPU, as Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return next(filter(None, names), platform.processor() or platform.machine())


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


def file_of(key: Key, what: Kind = "kernels") -> Path:
    """Return the file of a key, in ``$LIGHTNING_PEFT_CACHE`` or the user's cache folder.

    A variable that is empty counts as absent.
    """
    folder = os.environ.get("LIGHTNING_PEFT_CACHE")
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(home) / "lightning_peft")
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(os.path.expanduser(folder)) / f"{what}-{name}.json"


def read_verdicts(key: Key) -> dict[tuple[str, str], Verdict]:
    """Return the verdicts stored for a key, by op and configuration."""
    found = read_entries(key, "kernels", Verdict)
    return {(verdict.op, verdict.configuration): verdict for verdict in found}


def store_verdicts(key: Key, found: Mapping[tuple[str, str], Verdict]) -> str:
    """Replace the file of a key; return why it could not be written, or "".

    Hold `verdict_lock` from reading to storing, so that two processes lose nothing. What is
    unchecked is left out.
    """
    checked = [verdict for verdict in found.values() if verdict.outcome != "unchecked"]
    return store_entries(key, "kernels", [asdict(verdict) for verdict in checked])


def read_entries(key: Key, what: Kind, kind: type[T]) -> list[T]:
    """Return what is stored for a key; nothing from a file that cannot be used, with a warning.

    Args:
        key: What the entries depend on.
        what: ``"kernels"`` or ``"races"``.
        kind: Dataclass of an entry, which raises ValueError for values that cannot be used.
    """
    path, name = file_of(key, what), _FIELDS[what]
    try:
        stored = json.loads(path.read_text("utf-8"))
        if not isinstance(stored, dict) or "key" not in stored:
            raise ValueError(f"expected an object with key and {name}, got {reprlib.repr(stored)}")
        if stored["key"] != key:
            raise ValueError(f"it belongs to {stored['key']}")
        entries: Any = stored.get(name)
        expect(name, entries, isinstance(entries, list), "a list")
        return [entry_of(kind, entry) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []  # if a file is in the place of the folder, storing says so
    except (OSError, ValueError, RecursionError) as error:
        told = (
            f"{path}: expected {name} on kernels for {key['device']}, got a file that cannot be "
            f"used ({error}); its kernels count as unchecked. Delete it and run "
            "`python -m lightning_peft check`."
        )
    if told not in _WARNED:
        _WARNED.add(told)
        warnings.warn(told, stacklevel=3)
    return []


def store_entries(key: Key, what: Kind, entries: Sequence[Mapping[str, Any]]) -> str:
    """Replace the file of a key as one step; return why it could not be written, or ""."""
    path = file_of(key, what)
    text = json.dumps({"key": key, _FIELDS[what]: list(entries)}, indent=1)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(path)
    except (FileExistsError, NotADirectoryError):
        folder = path.parent
        file = next((place for place in (folder, *folder.parents) if place.is_file()), folder)
        return (
            f"{folder}: not written: expected a folder, got the file {file}; set "
            "LIGHTNING_PEFT_CACHE to a folder"
        )
    except OSError as error:
        return f"{path}: not written: {error.strerror or error}"
    finally:
        with suppress(OSError):  # it was renamed, or its folder cannot be used
            part.unlink()
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
