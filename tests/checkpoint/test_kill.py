"""kill -9 at random moments, saves included: every restart resumes and ends as an uninterrupted
run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


@pytest.mark.parametrize(
    ("kills", "seed"), [(7, 0), *(pytest.param(20, s, marks=pytest.mark.slow) for s in (1, 2, 3))]
)
def test_killed_runs_end_equal(kills: int, seed: int, tmp_path: Path) -> None:
    out = run_function(
        "tests.checkpoint.kill_job:main",
        [str(tmp_path), kills, seed],
        tmp_path,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    assert out.strip().endswith("equal"), out[-3000:]
    kills_seen = [line.split() for line in out.splitlines() if line.startswith("killed at")]
    assert len(kills_seen) == kills
    assert len({line[2] for line in kills_seen}) > 3, kills_seen  # batches, and steps of a save
    assert len({line[-1] for line in kills_seen}) > 2, kills_seen  # at several epochs
