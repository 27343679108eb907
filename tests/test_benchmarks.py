"""The benchmarks' smoke runs: every row is there, with device, versions, date and command."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.helpers.forks import run_script

FOLDER = Path(__file__).parent.parent / "benchmarks"
ABOUT = ["device", "versions", "date", "command"]
# Script → a column that is measured on a CPU in every row that names no reason.
SCRIPTS = {
    "gpu/kernel_ops.py": "median_ms",
    "gpu/optimizer.py": "median_ms",
    "gpu/small_batch.py": "tokens_per_s",
    "gpu/training.py": "tokens_per_s",
    "gpu/experts.py": "median_ms",
}
QUICK = ("gpu/kernel_ops.py", "gpu/training.py")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_gpu_benchmark_is_run_here() -> None:
    assert {f"gpu/{p.name}" for p in FOLDER.glob("gpu/*.py")} == set(SCRIPTS)


@pytest.mark.parametrize(
    "script",
    [
        script if script in QUICK else pytest.param(script, marks=pytest.mark.slow)
        for script in SCRIPTS
    ],
)
def test_smoke(script: str, tmp_path: Path) -> None:
    run_script(FOLDER / script, ["--smoke", "--csv", str(tmp_path / "rows.csv")], tmp_path)
    found = rows(tmp_path / "rows.csv")
    assert len(found) >= 4
    for row in found:
        assert all(row[name] for name in ABOUT), row
    measured = [row for row in found if row[SCRIPTS[script]] != "not measured"]
    assert len(measured) >= len(found) / 2
    ours = [row for row in measured if "ours" in str(row.values())]
    assert ours, "our own rows are missing"
    if script == "gpu/training.py":
        # The same model and tokens: what differs is the storage's rounding and the compute's.
        losses = [float(row["loss_first"]) for row in measured]
        norms = [float(row["grad_norm_first"]) for row in measured]
        assert max(losses) - min(losses) < 0.05
        assert max(norms) < 1.5 * min(norms)


@pytest.mark.parametrize("script", ["gpu/kernel_ops.py", "gpu/optimizer.py", "gpu/experts.py"])
def test_without_a_gpu_the_rows_say_so(script: str, tmp_path: Path) -> None:
    run_script(FOLDER / script, ["--csv", str(tmp_path / "rows.csv")], tmp_path)
    assert all(row["median_ms"] == "not measured" for row in rows(tmp_path / "rows.csv"))


def test_cpu_benchmark_of_4_bit_smoke(tmp_path: Path) -> None:
    assert "dequantize 64x128" in run_script(FOLDER / "cpu/nf4.py", ["--smoke"], tmp_path)
