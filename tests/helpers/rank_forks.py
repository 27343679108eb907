"""The ranks of a small run, forked from the calling process, so that a start costs no imports."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

__all__ = ["free_port", "run_ranks"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def run_ranks(
    work: Callable[[int], object], ranks: int, limit: float = 60.0
) -> tuple[list[int], float]:
    """Call `work` with every rank, each in a process of its own, in one process group.

    Returns:
        Exit statuses by rank, and seconds.

    Raises:
        TimeoutError: a process runs for more than `limit` seconds. All are killed.
    """
    begun, port, group, pids = time.perf_counter(), free_port(), 0, []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            _become(work, rank, ranks, port)
        group = group or pid
        os.setpgid(pid, group)
        pids.append(pid)
    statuses: dict[int, int] = {}
    while len(statuses) < ranks:
        for pid in pids:
            if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
        if time.perf_counter() - begun > limit:
            os.killpg(group, signal.SIGKILL)
            raise TimeoutError(f"still running after {limit} s; ended were {statuses}")
        time.sleep(0.01)
    return [statuses[pid] for pid in pids], time.perf_counter() - begun


def _become(work: Callable[[int], object], rank: int, ranks: int, port: int) -> None:
    """Run one rank; never returns."""
    while os.getpgid(0) == os.getpgid(os.getppid()):
        time.sleep(0.001)  # until the parent has put it into the group
    if ranks > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
        }
    status = 1
    try:
        work(rank)
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
