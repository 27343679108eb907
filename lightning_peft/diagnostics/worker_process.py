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
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["Ended", "run_worker"]

#: Time to start, which imports torch and triton, and then for each piece of work: a kernel that
#: never ends must not hold the others up.
_SECONDS = 600.0
#: Signals that a fault of the work never raises.
_FROM_OUTSIDE = {
    s.value: s.name for s in signal.Signals if s.name in ("SIGKILL", "SIGTERM", "SIGHUP")
}


class Ended(NamedTuple):
    """How a worker ended in the middle of its work.

    Attributes:
        starts: What it had announced last.
        message: The last line of its errors.
        from_outside: Whether another program ended it, as the kernel does if memory runs out: its
            work is not at fault.
    """

    starts: list[str]
    message: str
    from_outside: bool = False


def run_worker(
    worker: str,
    request: Mapping[str, Any],
    *,
    interpret: bool = False,
    seconds: float = _SECONDS,
    started: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Generator[dict[str, Any], None, Ended | None]:
    """Run ``python -m WORKER REQUEST`` and yield its results.

    Args:
        worker: Module to run.
        request: What it is given, as JSON, with its ``"device"``.
        interpret: Whether Triton's interpreter runs kernels.
        seconds: Time after a line without another one until the worker is ended.
        started: Called with the process.

    Returns:
        How it ended, or None if it finished.

    Raises:
        RuntimeError: It ended before it announced anything, so nothing is known.
        KeyboardInterrupt: The user interrupted the worker, as Ctrl-C in a terminal does.
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
        silent = threading.Event()
        try:
            if started is not None:
                started(process)
            for line in _lines(process, seconds, silent):
                entry: dict[str, Any] = json.loads(line)
                starts = entry.get("starts", [])
                if not starts:
                    yield entry
            status = process.wait()
        finally:
            process.kill()  # the caller was interrupted, or takes no more results
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if status == -signal.SIGINT:
            raise KeyboardInterrupt
        errors.seek(0)
        from_outside = -status in _FROM_OUTSIDE and not silent.is_set()
        last = (errors.read().strip().splitlines() or [f"exit status {status}"])[-1]
        if silent.is_set():
            last = f"no result for {seconds:,.0f} s"
        elif from_outside:
            last = f"ended by {_FROM_OUTSIDE[-status]} from outside; no memory left?"
    if status and not starts:
        raise RuntimeError(
            f"check of {request['device']}: expected a process that checks kernels, got one that "
            f"ended at its start ({last}); no kernel was checked"
        )
    return Ended(starts, last[:200], from_outside) if status else None


def _lines(
    process: subprocess.Popen[str], seconds: float, silent: threading.Event
) -> Iterator[str]:
    """Yield the lines that a process prints.

    If the next one does not come in time, set `silent` and end the process.
    """
    assert process.stdout is not None  # Popen was given a pipe

    def end() -> None:
        silent.set()
        process.kill()

    patience = _SECONDS
    while True:
        limit = threading.Timer(patience, end)
        limit.start()
        try:
            line = process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            return
        yield line
        patience = seconds
