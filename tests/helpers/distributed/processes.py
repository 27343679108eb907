"""Real processes, one group of them a run; ended by their own ids whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.helpers.distributed.jobs import Job
from tests.helpers.forks import server
from tests.helpers.rank_forks import free_port

ROOT = Path(__file__).resolve().parents[3]


def environment() -> dict[str, str]:
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(map(str, (ROOT / "triton_kernels", ROOT, *filter(None, given))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


class Processes:
    """`count` ranks of one run over the same jobs."""

    def __init__(self, count: int, jobs: Sequence[Job], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        listed = folder / f"jobs-{time.monotonic_ns()}.json"
        listed.write_text(json.dumps([asdict(j) for j in jobs]))
        self.logs = [listed.with_suffix(f".{rank}.log") for rank in range(count)]
        port = str(free_port())
        server().prepare("tests.helpers.distributed.jobs:warm_up")
        self.pids: list[int] = []
        for rank, log in enumerate(self.logs):
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
            }
            pid = server().start(
                "tests.helpers.distributed.jobs:main",
                [str(listed)],
                log,
                environment if count > 1 else {},
            )
            self.pids.append(pid)

    def poll(self) -> list[int | None]:
        """Exit statuses; None where one still runs."""
        return server().poll(self.pids)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit statuses.

        Raises:
            TimeoutError: one still runs; all are ended first.
        """
        end = time.monotonic() + timeout
        try:
            while time.monotonic() < end:
                statuses = self.poll()
                if None not in statuses:
                    return [s for s in statuses if s is not None]
                time.sleep(0.05)
            raise TimeoutError(f"still running after {timeout} s\n{self.text()}")
        finally:
            self.end()

    def end(self) -> None:
        """Kill what is left, by group id."""
        for pid, status in zip(self.pids, self.poll(), strict=True):
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)


def run(count: int, jobs: Sequence[Job], folder: Path, timeout: float = 200) -> None:
    """All jobs, to the end.

    Results decide, not exit statuses: gloo's teardown aborts a process now and then.
    """
    group = Processes(count, jobs, folder)
    group.wait(timeout)
    for job in jobs:
        for rank in range(count):
            assert result_file(job, rank).exists(), f"{job.name}\n{group.text()}"


def result_file(job: Job, rank: int = 0) -> Path:
    return Path(job.folder) / f"{job.name}-{rank}.pt"


def result(job: Job, rank: int = 0) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(result_file(job, rank), weights_only=False)
    return loaded


def difference(a: Job, b: Job) -> float:
    """Largest between any two elements of the adapters."""
    one, two = result(a)["adapters"], result(b)["adapters"]
    assert set(one) == set(two)
    return max(float((one[k] - two[k]).abs().max()) for k in one)
