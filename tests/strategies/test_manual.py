"""Several optimizers in manual optimisation, and parts that are unfrozen later, under DDP."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


@pytest.mark.parametrize(("way", "steps"), [("both", 16), ("in turn", 8), ("toggled", 16)])
def test_several_optimizers(way: str, steps: int, tmp_path: Path) -> None:
    environment = {"LIGHTNING_PACKAGE": current()}
    target = "tests.strategies.manual_job:main"
    out = run_function(target, [way], tmp_path, environment=environment)
    assert "statuses [0, 0]" in out, out[-3000:]
    lines = sorted(line.split(": ")[1] for line in out.splitlines() if line.startswith("rank "))
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].split()[1:] == ["True", str(steps)]


def test_parts_that_are_unfrozen_later_need_one_process(tmp_path: Path) -> None:
    environment = {"LIGHTNING_PACKAGE": current()}
    target = "tests.strategies.finetuning_job:main"
    out = run_function(target, [], tmp_path, environment=environment)
    assert out.count("expected one process with BackboneFinetuning, got 2") >= 2
    assert "statuses [1, 1]" in out
