"""A set of runs made once, although two test processes ask for it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["made_once"]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled, in this test process or in another of the session."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "failed").exists():
            pytest.fail((folder / "failed").read_text(), pytrace=False)
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                make(folder)
            except (AssertionError, TimeoutError) as error:
                (folder / "failed").write_text(str(error))
                raise
            (folder / "done").touch()
    return folder
