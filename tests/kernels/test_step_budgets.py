"""Budgets of a step of an adapted layer, without a GPU: ops, launches, bytes, Python calls.

The committed table holds the counts of this code, which no change may exceed, and those of the code
before kernels were chosen by chip, for comparison.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.helpers.forks import run_function
from tests.helpers.layer_budgets import FIELDS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "layer_budgets.csv"
COUNTS = ("ops", "launches", "bytes", "calls")
Rows = dict[str, dict[str, str]]


def rows(path: Path, code: str = "now") -> Rows:
    with path.open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file) if row["code"] == code}


def counted(folder: Path, *, fast: bool) -> Rows:
    pytest.importorskip("triton")
    table = folder / "budgets.csv"
    run_function(
        "tests.helpers.layer_budgets:run_budgets",
        ["sm_90", str(table), fast],
        folder,
        timeout=300,
        environment={"TRITON_CACHE_DIR": str(folder / "cache")},
    )
    return rows(table)


def check(found: Rows) -> None:
    committed = rows(RESULTS)
    for case, row in found.items():
        for name in COUNTS:
            assert int(row[name]) <= int(committed[case][name]), (case, name, row)
        assert row["made"] == committed[case]["made"]


def test_budgets_of_the_usual_layers(tmp_path: Path) -> None:
    found = counted(tmp_path, fast=True)
    assert len(found) == 4
    check(found)


@pytest.mark.slow
def test_budgets_of_all_layers(tmp_path: Path) -> None:
    found = counted(tmp_path, fast=False)
    assert found.keys() == rows(RESULTS).keys()
    check(found)


def test_the_committed_table() -> None:
    now, before = rows(RESULTS), rows(RESULTS, "before")
    with RESULTS.open(newline="") as file:
        assert tuple(csv.DictReader(file).fieldnames or ()) == FIELDS
    # Both groups move fewer bytes than their layers one by one; before, gate and up moved more.
    for group in ("q, k, v", "gate, up"):
        together, apart = (now[f"{group} on NF4 {how}, training"] for how in ("grouped", "apart"))
        assert int(together["bytes"]) < int(apart["bytes"])
    # Only the optimizer copies numbers, from pinned memory.
    rows_on = "lightning_peft_kernels.optim.step_inputs.rows_on"
    made = {case: row["made"] for case, row in now.items() if row["made"]}
    assert made == {"8-bit AdamW, step": rows_on}
    # Small steps wait for Python: calls per LoRA layer were halved. No other kind takes more.
    calls = {case: int(row["calls"]) / int(before[case]["calls"]) for case, row in now.items()}
    assert max(calls.values()) < 1.0
    for case in (
        "LoRA, generation",
        "LoRA on NF4, generation",
        "LoRA, training",
        "LoRA on NF4, training",
        "q, k, v on NF4 grouped, training",
        "gate, up on NF4 grouped, training",
    ):
        assert calls[case] <= 0.5, case
