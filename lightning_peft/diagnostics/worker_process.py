"""A process that works on a device and tells its results line by line: a fault ends it alone.

The worker prints one JSON object per line: ``{"starts": [...]}`` before each piece of work, and any
other object as a result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["Ended", "run_worker"]

#: Time to start, which imports torch and triton, and then for each piece of work: a kernel that
#: never ends must not hold the others up.
_SECONDS = 600.0


class Ended(NamedTuple):
    """How a worker ended in the middle of its work.

    Attributes:
        starts: What it had announced last.
        message: The last line of its errors.
    """

    starts: list[str]
    message: str


def run_worker(
    worker: str,
    request: Mapping[str, Any],
    *,
    interpret: bool = False,
    seconds: float = _SECONDS,
) -> Generator[dict[str, Any], None, Ended | None]:
    """Run ``python -m WORKER REQUEST`` and yield its results.

    Args:
        worker: Module to run.
        request: What it is given, as JSON, with its ``"device"``.
        interpret: Whether Triton's interpreter runs kernels.
        seconds: Time after a line without another one until the worker is ended.

    Returns:
        How it ended, or None if it finished.

    Raises:
        RuntimeError: It ended before it announced anything, so nothing is known.
    """
    environment = dict(os.environ)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
        environment.setdefault("OMP_NUM_THREADS", "1")  # the interpreter works on tiny tensors
    starts: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", worker, json.dumps(request)], stdout=subprocess.PIPE,
            stderr=errors, text=True, env=environment,
        )  # fmt: skip
        try:
            for line in _lines(process, seconds):
                entry: dict[str, Any] = json.loads(line)
                starts = entry.get("starts", [])
                if not starts:
                    yield entry
            status = process.wait()
        finally:
            process.kill()  # the caller was interrupted, or takes no more results
            process.wait()
        errors.seek(0)
        ended = f"exit status {status}"
        if status == -signal.SIGKILL:
            ended = f"killed: no memory left, or no result for {seconds:,.0f} s"
        last = (errors.read().strip().splitlines() or [ended])[-1]
    if status and not starts:
        raise RuntimeError(
            f"check of {request['device']}: expected a process that checks kernels, got one that "
            f"ended at its start ({last}); no kernel was checked"
        )
    return Ended(starts, last[:200]) if status else None


def _lines(process: subprocess.Popen[str], seconds: float) -> Iterator[str]:
    """Yield the lines that a process prints; end it if the next one does not come in time."""
    assert process.stdout is not None  # Popen was given a pipe
    patience = _SECONDS
    while True:
        limit = threading.Timer(patience, process.kill)
        limit.start()
        try:
            line = process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            return
        yield line
        patience = seconds
