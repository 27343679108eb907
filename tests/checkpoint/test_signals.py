"""SIGKILL, SIGTERM and SIGINT at random moments: every restart ends as an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


@pytest.mark.parametrize(
    ("count", "seed", "ranks"),
    [
        (3, 1, 1),
        (2, 1, 2),
        *(pytest.param(40, 0, ranks, marks=pytest.mark.slow) for ranks in (1, 2)),
    ],
)
def test_runs_with_signals_end_equal(count: int, seed: int, ranks: int, tmp_path: Path) -> None:
    out = run_function(
        "tests.checkpoint.signal_job:main",
        [str(tmp_path), count, seed, ranks],
        tmp_path,
        timeout=1500,
        environment={"LIGHTNING_PACKAGE": current()},
    )
    assert out.strip().endswith("equal"), out[-3000:]
    slowest = next(line for line in out.splitlines() if line.startswith("slowest"))
    assert float(slowest.split()[1]) < 60
