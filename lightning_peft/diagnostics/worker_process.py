"""A process that works on a device and tells its results line by line: a fault ends it alone.

The worker prints one JSON object per line: ``{"starts": [...]}`` before each piece of work, and any
other object as a result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

__all__ = ["Ended", "run_worker"]

_SECONDS = 600


class Ended(NamedTuple):
    """How a worker ended in the middle of its work.

    Attributes:
        starts: What it had announced last.
        message: The last line of its errors.
    """

    starts: list[str]
    message: str


def run_worker(
    worker: str, request: Mapping[str, Any], *, interpret: bool = False
) -> Generator[dict[str, Any], None, Ended | None]:
    """Run ``python -m WORKER REQUEST`` and yield its results.

    Args:
        worker: Module to run.
        request: What it is given, as JSON, with its ``"device"``.
        interpret: Whether Triton's interpreter runs kernels.

    Returns:
        How it ended, or None if it finished.

    Raises:
        RuntimeError: It ended before it announced anything, so nothing is known.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    starts: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", worker, json.dumps(request)], stdout=subprocess.PIPE,
            stderr=errors, text=True, env=environment,
        )  # fmt: skip
        assert process.stdout is not None  # Popen was given PIPE
        limit = threading.Timer(_SECONDS, process.kill)  # a kernel that never ends
        limit.start()
        try:
            for line in process.stdout:
                entry: dict[str, Any] = json.loads(line)
                starts = entry.get("starts", [])
                if not starts:
                    yield entry
            status = process.wait()
        finally:
            limit.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit status {status}"])[-1]
    if status and not starts:
        raise RuntimeError(
            f"check of {request['device']}: expected a process that checks kernels, got one that "
            f"ended at its start ({last}); no kernel was checked"
        )
    return Ended(starts, last[:200]) if status else None
