"""kill -9 at random moments, saves included: every restart resumes and ends as an uninterrupted
run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kills", "seed"), [(7, 0), *(pytest.param(20, s, marks=pytest.mark.slow) for s in (1, 2, 3))]
)
def test_killed_runs_end_equal(kills: int, seed: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.checkpoint.kill_job",
        str(tmp_path),
        str(kills),
        str(seed),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, out[-3000:]
    assert out.strip().endswith("equal"), out[-3000:]
    kills_seen = [line.split() for line in out.splitlines() if line.startswith("killed at")]
    assert len(kills_seen) == kills
    assert len({line[2] for line in kills_seen}) > 3, kills_seen  # batches, and steps of a save
    assert len({line[-1] for line in kills_seen}) > 2, kills_seen  # at several epochs
