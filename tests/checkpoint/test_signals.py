"""SIGKILL, SIGTERM and SIGINT at random moments: every restart ends as an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


@pytest.mark.parametrize(
    ("count", "seed", "strategy"),
    [
        (3, 1, ""),
        (2, 1, "ddp"),
        (1, 1, "folder"),
        *(pytest.param(40, 0, s, marks=pytest.mark.slow) for s in ("", "ddp")),
        *(pytest.param(15, 0, s, marks=pytest.mark.slow) for s in ("fsdp", "folder")),
    ],
)
def test_runs_with_signals_end_equal(count: int, seed: int, strategy: str, tmp_path: Path) -> None:
    out = run_function(
        "tests.checkpoint.signal_job:main",
        [str(tmp_path), count, seed, strategy],
        tmp_path,
        timeout=1500,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    assert out.strip().endswith("equal"), out[-3000:]
    slowest = next(line for line in out.splitlines() if line.startswith("slowest"))
    assert float(slowest.split()[1]) < 60


def test_a_killed_folder_save_leaves_nothing_behind(tmp_path: Path) -> None:
    out = run_function(
        "tests.checkpoint.signal_job:kill_a_folder_save",
        [str(tmp_path)],
        tmp_path,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    lines = [line for line in out.splitlines() if line.startswith(("killed", "resumed"))]
    # Rank 0 clears up behind another rank; behind rank 0 the next start does.
    assert lines[0].startswith("killed 0: ['.")
    assert lines[1:] == ["resumed 0: []", "killed 1: []", "resumed 1: []"]
