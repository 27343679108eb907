"""Two nodes of one process each, by torchrun, as on two machines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.helpers.distributed.jobs import Job
from tests.helpers.distributed.processes import ROOT, difference, environment, run
from tests.helpers.rank_forks import free_port


@pytest.mark.usefixtures("lightning_package")
@pytest.mark.slow
def test_two_nodes_by_torchrun(tmp_path: Path) -> None:
    nodes = [
        Job(name, str(tmp_path), strategy=name, devices=1, nodes=2)
        for name in ("peft_ddp", "peft_fsdp")
    ]
    listed = tmp_path / "nodes.json"
    listed.write_text(json.dumps([asdict(j) for j in nodes]))
    port = free_port()
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1"]
        command += [f"--master-port={port}", "-m", "tests.helpers.distributed.jobs", str(listed)]
        with open(tmp_path / f"node-{node}.log", "w") as log:
            agents.append(
                subprocess.Popen(
                    command,
                    env=environment(),
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        for agent in agents:
            agent.wait(240)
    finally:
        for agent in agents:
            if agent.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(agent.pid, signal.SIGKILL)
    one = Job("one", str(tmp_path))
    run(1, [one], tmp_path)
    for job in nodes:
        assert difference(one, job) <= 1e-5, (tmp_path / "node-0.log").read_text()[-3000:]
