"""Processes that start in milliseconds: a server, forked before the first test, forks them.

The server holds every module that the collected tests import, and no state of a test. A new
interpreter would need five seconds of imports.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["ForkServer", "run_function", "run_script", "server"]


class ForkServer:
    """The parent of all processes that a test session starts through this file."""

    def __init__(self) -> None:
        requests, to_server = os.pipe()
        from_server, answers = os.pipe()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the session
        self.pid = os.fork()
        if self.pid == 0:
            _become_server(requests, answers, self.errors.fileno())
        os.close(requests)
        os.close(answers)
        self._to_server = os.fdopen(to_server, "w")
        self._from_server = os.fdopen(from_server)

    def start(
        self, target: str, arguments: Sequence[Any], log: Path, environment: dict[str, str]
    ) -> int:
        """Run ``module:function`` in a process of its own and return the process id.

        Args:
            target: The function, which may call `sys.exit`.
            arguments: Its arguments, as JSON values.
            log: File that receives stdout and stderr.
            environment: Variables to set.
        """
        request = {
            "target": target,
            "arguments": list(arguments),
            "log": str(log),
            "environment": environment,
        }
        pid: int = self._ask(request)
        return pid

    def poll(self, pids: Sequence[int]) -> list[int | None]:
        """Return exit statuses; None for a running process."""
        statuses: list[int | None] = self._ask({"poll": list(pids)})
        return statuses

    def prepare(self, target: str) -> None:
        """Run a function once in the server, so that all later processes start after it."""
        self._ask({"prepare": target})

    def close(self) -> None:
        """End the server and wait for it."""
        self._to_server.close()
        os.waitpid(self.pid, 0)

    def _ask(self, request: dict[str, Any]) -> Any:
        self._to_server.write(json.dumps(request) + "\n")
        self._to_server.flush()
        line = self._from_server.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"the fork server ended\n{self.errors.read()[-4000:]}")
        return json.loads(line)


@lru_cache(maxsize=1)
def server() -> ForkServer:
    """Return the server of this test process; conftest.py forks it right after collection."""
    return ForkServer()


def _become_server(requests: int, answers: int, errors: int) -> None:
    """Serve until the requests end; never returns."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        # pytest's and execnet's pipes must close with the test process, not with this one.
        _close_all_but(requests, answers)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        _redirect_logging()
        _serve(requests, answers)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _redirect_logging() -> None:
    """Point the handlers at the new stderr: those of imported libraries hold pytest's."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)


def _close_all_but(*kept: int) -> None:
    first = 3
    for fd in (*sorted(kept), 4096):
        os.closerange(first, fd)
        first = fd + 1


def _serve(requests: int, answers: int) -> None:
    statuses: dict[int, int | None] = {}
    prepared: set[str] = set()
    out = os.fdopen(answers, "w")
    for line in os.fdopen(requests):
        request = json.loads(line)
        answer: Any = None
        if "poll" in request:
            _reap(statuses)
            answer = [statuses[pid] for pid in request["poll"]]
        elif "prepare" in request:
            if request["prepare"] not in prepared:
                _function(request["prepare"])()
                prepared.add(request["prepare"])
        else:
            answer = os.fork()
            if answer == 0:
                _run(request)
            statuses[answer] = None
        print(json.dumps(answer), file=out, flush=True)


def _reap(statuses: dict[int, int | None]) -> None:
    for pid in [p for p, status in statuses.items() if status is None]:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            statuses[pid] = os.waitstatus_to_exitcode(status)


def _run(request: dict[str, Any]) -> None:
    """Become the requested process; never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _close_all_but()
    os.environ.update(request["environment"])
    status = 1
    try:
        _function(request["target"])(*request["arguments"])
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def run_function(
    target: str,
    arguments: Sequence[Any],
    folder: Path,
    timeout: float = 280,
    environment: dict[str, str] | None = None,
) -> str:
    """Run ``module:function`` in a process of its own and return what it printed.

    Raises:
        AssertionError: its exit status is not 0.
        TimeoutError: it still runs after `timeout` seconds; it is killed.
    """
    log = folder / f"process-{time.monotonic_ns()}.log"
    pid = server().start(target, arguments, log, environment or {})
    end = time.monotonic() + timeout
    while (status := server().poll([pid])[0]) is None:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            raise TimeoutError(f"{target}: still running after {timeout} s\n{log.read_text()}")
        time.sleep(0.05)
    printed = log.read_text()
    assert status == 0, f"{target}: exit status {status}\n{printed[-4000:]}"
    return printed


def run_script(script: Path, arguments: Sequence[str], folder: Path, timeout: float = 280) -> str:
    """Run a script on the CPU, as `python script arguments` would, and return what it printed."""
    server().prepare("tests.helpers.forks:_import_libraries")
    target = "tests.helpers.forks:_script"
    return run_function(
        target, [str(script), *arguments], folder, timeout, {"CUDA_VISIBLE_DEVICES": ""}
    )


def _import_libraries() -> None:
    for name in ("bitsandbytes", "lightning_peft", "peft", "transformers"):
        importlib.import_module(name)


def _script(path: str, *arguments: str) -> None:
    import torch

    if torch.cuda.is_available():  # counted before the fork; a new interpreter sees no GPU
        os.execv(sys.executable, [sys.executable, path, *arguments])
    torch.set_num_threads(1)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
