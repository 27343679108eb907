"""Triton kernels compiled for chips that are not here: no spill, shared memory fits, wgmma used."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_peft_kernels.tools import aot
from lightning_peft_kernels.tools.aot import Row, broken
from lightning_peft_kernels.tools.targets import TARGETS, why_left_out

from tests.helpers.forks import run_function

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "aot.csv"


def run(*arguments: str) -> list[str]:
    """The command, in its own process: it forks one more for each compilation."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft_kernels.tools.aot", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout.splitlines()


def compile_sample(count: int) -> None:
    """Print the broken rows among `count` kernels, one configuration each."""
    names = [spec["name"] for spec in aot.specs() if spec.get("fast")]
    for name in random.Random(20).sample(names, count):
        rows = list(aot.table(fast=True, only=name, targets=["sm_90"]))
        assert rows, name
        assert [(row.kernel, broken(row)) for row in rows if broken(row)] == []
        print(len(rows), "compiled", name)


def test_a_sample_of_kernels_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    printed = run_function("tests.kernels.tools.test_aot:compile_sample", [5], tmp_path)
    assert printed.count("compiled") == 5


@pytest.mark.slow
def test_one_configuration_of_each_kernel_for_hopper() -> None:
    rows = run("--fast", "--targets", "sm_90")
    assert rows[-1].endswith("0 broken")
    assert len(rows) > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target: str) -> None:
    assert run("--targets", target)[-1].endswith("0 broken")


def test_the_committed_table_holds_every_configuration() -> None:
    """As `make aot` writes it; what it holds was compiled for the chip or is left out there."""
    pytest.importorskip("triton")
    with RESULTS.open(newline="") as file:
        rows = {(row["kernel"], row["target"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {(spec["name"], target) for spec in aot.specs() for target in TARGETS}
    for spec in aot.specs():
        for target, at in TARGETS.items():
            row = rows[spec["name"], target]
            left_out = bool(why_left_out(spec, at.chip))
            assert row["outcome"].startswith("skipped" if left_out else "ok"), row
            assert int(row["shared"]) <= at.shared, row
            assert row["spills"] == "0", row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("k", "sm_90", spills=8), "8 bytes spilled"),
        (Row("k", "gfx942", shared=65_537), "65537 bytes of shared memory, 65536"),
        (Row("k", "sm_90", gemm=True, matrix="mma"), "expected wgmma, got mma"),
        (Row("k", "sm_80", gemm=True, matrix="mma"), ""),
        (Row("k", "sm_90", outcome="the compiler ended its process"), "ended its process"),
        (Row("k", "sm_90", outcome="skipped: no fp8"), ""),
    ],
)
def test_rules(row: Row, message: str) -> None:
    assert message in broken(row)
    assert bool(broken(row)) == bool(message)
