"""A process that has imported everything and forks the ranks of test runs: a start takes half a
second instead of ten.

Requests come as JSON lines on stdin, answers go to stdout.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any


def child(rank: int, request: dict[str, Any]) -> None:
    """Become rank `rank`; never returns."""
    os.setsid()
    log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(request["environments"][rank])
    status = 1
    try:
        from tests.helpers.distributed import jobs

        jobs.main(request["jobs"])
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def poll(running: dict[int, int | None]) -> None:
    for pid in [p for p, status in running.items() if status is None]:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            running[pid] = os.waitstatus_to_exitcode(status)


def serve() -> None:
    running: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "jobs" in request:
            pids = []
            for rank in range(len(request["logs"])):
                pid = os.fork()
                if pid == 0:
                    child(rank, request)
                pids.append(pid)
                running[pid] = None
            answer: Any = pids
        else:
            poll(running)
            answer = [running[pid] for pid in request["poll"]]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    # On this interpreter's stdout nothing but answers may appear.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import lightning.pytorch
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    from tests.helpers.distributed import jobs

    torch.set_num_threads(1)
    del lightning
    with tempfile.TemporaryDirectory() as folder:  # what a first run imports late
        jobs.run(jobs.Job("warm", folder, epochs=1, optimizer="adamw_8bit"))
    sys.stdout = answers
    serve()
