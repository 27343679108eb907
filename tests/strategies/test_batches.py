"""Different numbers of batches per process: an error at the start where ranks would hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forks import run_function
from tests.helpers.lightning_package import current

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]


def outcome(strategy: str, stage: str, uneven: str, folder: Path) -> str:
    environment = {"LIGHTNING_PACKAGE": current()}
    target = "tests.strategies.batches_job:main"
    return run_function(target, [strategy, stage, uneven], folder, environment=environment)


@pytest.mark.parametrize(
    ("strategy", "stage", "uneven", "told"),
    [
        ("peft_ddp", "fit", "train", "batches per epoch: 3 on rank 0, 4 on rank 1"),
        ("peft_fsdp", "fit", "val", "batches per validation: [3] on rank 0, [4] on rank 1"),
        ("peft_fsdp", "validate", "", "batches of validate: [3] on rank 0, [4] on rank 1"),
        ("peft_fsdp", "test", "", "batches of test: [3] on rank 0, [4] on rank 1"),
        ("peft_fsdp", "predict", "", "batches of predict: [3] on rank 0, [4] on rank 1"),
    ],
)
def test_where_ranks_would_hang(
    strategy: str, stage: str, uneven: str, told: str, tmp_path: Path
) -> None:
    out = outcome(strategy, stage, uneven, tmp_path)
    assert out.count(f"  {told}") == 2, out[-3000:]  # on both ranks
    assert "statuses [1, 1]" in out


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_evaluation_under_ddp_needs_no_equal_numbers(stage: str, tmp_path: Path) -> None:
    out = outcome("peft_ddp", stage, "val", tmp_path)
    assert "statuses [0, 0]" in out, out[-3000:]
