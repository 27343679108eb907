"""Budgets of one training step of an adapted NF4 layer: ops, launches and bytes, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forks import run_function


@pytest.mark.parametrize(
    ("dropout", "ops", "launches", "megabytes"),
    [
        # Forward: S, W dequantised, two products. Backward: W, one pass for both rank gradients
        # and their two sums, dA, the low rank's part of dX, dX.
        (0.0, 9, 5, 17.6),
        # And a seed, and the mask three times.
        pytest.param(0.1, 13, 8, 23.9, marks=pytest.mark.slow),
    ],
)
def test_a_training_step(
    dropout: float, ops: int, launches: int, megabytes: float, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    printed = run_function(
        "tests.helpers.step_calls:run_step",
        ["sm_90", dropout],
        tmp_path,
        environment={"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    found = [int(number) for number in printed.split()]
    assert found[0] <= ops
    assert found[1] <= launches
    assert found[2] <= 1e6 * megabytes
