"""Memory of a step on two ranks is what the planner says, with one copy of the head in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.forks import run_function
from tests.strategies.memory_job import OPTIONS, planned

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="peft_fsdp shards packed bytes from torch 2.13 on"
)


@pytest.mark.slow  # a machine with nothing else to do: load moves gloo's buffers in time
def test_measured_and_planned(tmp_path: Path) -> None:
    names = list(OPTIONS)
    out = tmp_path / "measured.json"
    run_function("tests.strategies.memory_job:main", [str(out), names], tmp_path)
    measured = json.loads(out.read_text())
    for name in names:
        assert planned(name) == pytest.approx(measured[name], rel=0.05), name
