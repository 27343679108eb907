"""The benchmarks' smoke runs: every row is there, with device, versions, date and command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft.diagnostics.bench_report import BenchResult
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
    others = {"gpu/first_day.py"}  # runs commands, and has a test of its own
    assert {f"gpu/{p.name}" for p in FOLDER.glob("gpu/*.py")} == set(SCRIPTS) | others


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_day_on_a_gpu_smoke(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    run = subprocess.run(
        [sys.executable, str(FOLDER / "gpu" / "first_day.py"), "--smoke", "--out", str(tmp_path)],
        env={**os.environ, "LIGHTNING_PEFT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:]
    assert "all steps passed" in run.stdout
    made = tmp_path / "cpu"
    names = {path.name for path in made.iterdir()}
    assert names == {"tests.txt", "check.txt", "bench.txt", "bench.jsonl"}
    line = (made / "bench.jsonl").read_text("utf-8").strip()
    assert BenchResult.read(line).value("step, ours")


def test_lines_of_users_are_read() -> None:
    path = FOLDER / "results" / "bench.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    for line in lines:
        assert BenchResult.read(line).value("step, ours")


def test_the_first_day_without_a_gpu_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    script = FOLDER / "gpu" / "first_day.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "first_day: expected a CUDA device, got none" in run.stdout


@pytest.mark.slow
def test_a_small_large_base(tmp_path: Path) -> None:
    """Ranks read each byte once, hold their part, and send no more than they must."""
    options = ["--layers", "2", "--hidden", "256", "--vocab", "1024", "--ranks", "1", "2"]
    out = subprocess.run(
        [sys.executable, str(FOLDER / "cpu" / "large_base.py"), *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    one, two = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert 0.45 < two["held_mb"] / one["held_mb"] < 0.65
    assert one["gathers"] == one["reductions"] == 0
    for row in (one, two):
        assert row["read_by_all"] == pytest.approx(1, abs=0.01)
        assert row["gathered_mb"] == row["gathered_ideal_mb"]
        assert row["reduced_mb"] == row["reduced_ideal_mb"]
