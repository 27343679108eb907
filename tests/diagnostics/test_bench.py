"""`bench`: its rows, what a user sends, and what it says without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_peft.__main__ import main
from lightning_peft.diagnostics import bench_cli, bench_rows
from lightning_peft.diagnostics.bench_models import SMOKE, Absent
from lightning_peft.diagnostics.bench_report import COLUMNS, BenchResult, markdown_row
from lightning_peft.diagnostics.bench_rows import Row, measure

CPU = torch.device("cpu")
ROWS = [
    Row("step, ours", "ms", 20.0),
    Row("step, peft + bitsandbytes", "ms", 30.0),
    Row("step, peft bf16", "ms", "peft is not installed"),
    Row("decode 1, ours", "ms", 2.5),
    Row("decode 1, peft + bitsandbytes", "ms", 10.0),
    Row("dequantise", "of copy", 0.84),
]
ABOUT = {"device": "NVIDIA H200", "capability": "9.0", "torch": "2.13.0"}


def result() -> BenchResult:
    kernels = {"checked": 12, "bad": ["scale (float16): wrong"]}
    return BenchResult.of(ABOUT, {"tokens": 2048}, kernels, ROWS)


def test_a_line_is_read_back() -> None:
    made = result()
    line = made.line()
    assert "\n" not in line
    assert BenchResult.read(line) == made


def test_a_row_for_a_table() -> None:
    cells = [cell.strip() for cell in markdown_row(result()).strip("|").split("|")]
    found = list(zip(COLUMNS, cells, strict=True))
    assert found[0] == ("device", "NVIDIA H200 9.0")
    assert found[2] == ("step, ms", "20")
    assert found[3] == ("against peft + bitsandbytes", "1.50 ×")
    assert found[4] == ("against bf16 LoRA", "–")
    assert found[6] == ("dequantise, of copy", "0.84")
    assert found[7] == ("decode 1 / 8 / 32, ms", "2.5 / – / –")
    assert found[8][1] == "4.00 × / – / –"
    assert found[-1] == ("kernels", "12 checked, 1 not used")


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "null", '{"version": 2}', '{"version": 1}', '{"version": 1, "rows": 3}'],
)
def test_another_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"bench: expected one line.*run bench again"):
        BenchResult.read(line)


def test_a_row_of_another_form_is_refused() -> None:
    stored = json.loads(result().line())
    stored["rows"]["step, ours"] = {"value": None, "unit": "ms"}
    with pytest.raises(ValueError, match="step, ours"):
        BenchResult.read(json.dumps(stored))


def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert main(["bench"]) == 2
    assert "bench: expected a CUDA device, got none; --smoke runs" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_are_no_time(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--smoke", "--minutes", minutes]) == 2
    told = f"bench: expected finite --minutes > 0, got {float(minutes)}"
    assert told in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """Minutes of each run, whose rows are at hand."""
    runs: list[float] = []

    def run(device: torch.device, minutes: float, *, smoke: bool) -> BenchResult:
        runs.append(minutes)
        if smoke:
            (tmp_path / "rows").mkdir()  # what was there before the run is not any more
        return result()

    monkeypatch.setattr(bench_cli, "run_bench", run)
    return runs


def test_a_path_that_cannot_be_written_costs_no_run(
    measured: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "rows.jsonl"):
        assert main(["bench", "--device", "cpu", "--out", str(path)]) == 2
        told = f"bench: expected --out as a file that can be appended to, got {path}: "
        assert told in capsys.readouterr().err
    assert measured == []


def test_rows_are_printed_before_they_are_written(
    measured: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--smoke", "--device", "cpu", "--out", str(tmp_path / "rows")]) == 2
    assert capsys.readouterr().out.strip().endswith(result().line())
    assert len(measured) == 1


def test_rows_are_appended(measured: list[float], tmp_path: Path) -> None:
    out = tmp_path / "folder" / "rows.jsonl"
    for _ in range(2):
        assert main(["bench", "--device", "cpu", "--out", str(out)]) == 0
    assert [BenchResult.read(line) for line in out.read_text("utf-8").splitlines()] == [
        result(),
        result(),
    ]


@pytest.mark.slow
def test_a_group_that_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise Absent("peft is not installed")

    def full(*given: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(bench_rows, "blocks", fails)
    monkeypatch.setattr(bench_rows, "expert_stacks", full)
    found = {row.name: row.value for row in measure(SMOKE, CPU, 0.01)}
    assert found["step and decode"] == "peft is not installed"
    assert str(found["experts"]).startswith("CUDA out of memory")
    for name in ("dequantise", "optimizer, ours 8-bit", "optimizer, torch AdamW"):
        value = found[name]
        assert isinstance(value, float)
        assert value > 0


@pytest.mark.slow
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "folder" / "rows.jsonl"
    for _ in range(2):
        assert main(["bench", "--smoke", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    first, second = map(BenchResult.read, out.read_text("utf-8").splitlines())
    assert BenchResult.read(printed[-1]) == second
    assert printed[-3] == markdown_row(second)
    for way in ("ours", "peft + bitsandbytes", "peft bf16"):
        for what in ("step", "decode 1", "decode 8", "decode 32"):
            assert second.value(f"{what}, {way}"), (what, way)
    assert second.value("experts, ours")
    assert first.environment["device"].startswith("cpu")
