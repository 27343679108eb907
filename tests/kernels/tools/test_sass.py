"""Budgets of machine instructions: counted from compiled code, kept as rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning_peft_kernels.tools.sass import budgets, hot_loop

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "budgets.csv"
NVIDIA = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 FFMA R5, R4, R3, R5 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
"""


def committed() -> list[dict[str, str]]:
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_longest_loop_is_found() -> None:
    assert hot_loop(SASS) == ["LDG", "FFMA", "BAR", "BRA"]
    straight = SASS.replace("@P0 BRA 0x10", "NOP")
    assert hot_loop(straight)[:3] == ["MOV", "LDG", "FFMA"]


def test_few_tokens_reach_seventy_percent_of_bandwidth_by_count() -> None:
    """4.4 instructions per weight: what an H200 may issue while its memory runs at 70 %."""
    found = [row for row in committed() if row["kernel"].startswith("decode pairs")]
    assert {row["target"] for row in found} == NVIDIA
    assert all(float(row["per_element"]) <= 4.4 for row in found)
    before = {r["target"]: r for r in committed() if r["kernel"] == "decode gemv nested"}
    for row in found:
        assert float(row["per_element"]) < float(before[row["target"]]["per_element"])
        assert int(row["barriers"]) < int(before[row["target"]]["barriers"])


def check(kernel: str, target: str) -> None:
    """Compiled again, a kernel takes no more than its committed row."""
    triton = pytest.importorskip("triton")
    rows = {(row["kernel"], row["target"]): row for row in committed()}
    found = list(budgets(kernel, target))
    assert found
    for one in found:
        row = rows[one.kernel, one.target]
        if row["triton"] != triton.__version__:
            pytest.skip(f"counted with triton {row['triton']}")
        assert one.per_element <= float(row["per_element"]), one
        for name in ("global_loads", "lookups", "barriers"):
            assert getattr(one, name) <= int(row[name]), one


def test_few_tokens_keep_their_budget() -> None:
    check("decode pairs nested", "sm_90")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_keeps_its_budget() -> None:
    check("", "")
