"""SIGTERM and the signal of a requeue under a simulated SLURM, one and two nodes on loopback."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path

import pytest

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

QUICK = [
    ("", True, "SIGTERM", False),
    ("fsdp", False, "SIGTERM", False),
    ("ddp", True, "SIGUSR1", False),
]
REST = [
    (strategy, requeue, name, everyone)
    for strategy in ("", "ddp", "fsdp", "folder")
    for requeue, name in ((True, "SIGTERM"), (False, "SIGTERM"), (True, "SIGUSR1"))
    for everyone in (False, True)
    if (strategy, requeue, name, everyone) not in QUICK
]


@pytest.mark.parametrize(
    ("strategy", "requeue", "name", "everyone"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_a_stopped_job_goes_on(
    strategy: str, requeue: bool, name: str, everyone: bool, tmp_path: Path
) -> None:
    out = run_function(
        "tests.checkpoint.slurm_job:main",
        [str(tmp_path), strategy, requeue, name, everyone],
        tmp_path,
        timeout=300,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    lines = dict(line.partition(" ")[::2] for line in out.splitlines())
    statuses, _, seconds = lines["statuses"].partition(" seconds ")
    assert set(literal_eval(statuses)) == {143}, out[-3000:]
    assert float(seconds) < 30  # SLURM's KillWait
    assert literal_eval(lines["scontrol"]) == (["requeue 77"] if name == "SIGUSR1" else [])
    names = literal_eval(lines["left"])
    if requeue:
        assert any(n.startswith("hpc_ckpt_1.ckpt") for n in names), names
    assert any(n.startswith("ckpt/sigterm.ckpt") for n in names), names
    assert not any(".tmp-" in n for n in names), names
    assert out.strip().endswith("equal"), out[-3000:]
