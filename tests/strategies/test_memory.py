"""Memory of a step on several ranks is what the planner says, with one copy of the head in it."""

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
@pytest.mark.parametrize("name", OPTIONS)
def test_measured_and_planned(name: str, tmp_path: Path) -> None:
    """Each in processes of its own, which hold nothing of another run."""
    out = tmp_path / "measured.json"
    run_function("tests.strategies.memory_job:main", [str(out), name], tmp_path)
    measured: int = json.loads(out.read_text())
    assert planned(name) == pytest.approx(measured, rel=0.05)
