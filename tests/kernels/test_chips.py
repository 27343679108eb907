"""Every launch on chips that are not here fits their limits, or another implementation is named."""

from __future__ import annotations

import ast
import csv
from pathlib import Path

import pytest

from tests.helpers.chip_cells import cells
from tests.helpers.fake_gpu import GPUS
from tests.helpers.forks import run_function

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fake_gpu.csv"


def rows(chip: str, folder: Path, *, fast: bool) -> list[dict[str, str]]:
    """The cells of a chip, run in a process of its own with an empty cache of kernels."""
    pytest.importorskip("triton")
    table = folder / f"{chip}.csv"
    run_function(
        "tests.helpers.chip_cells:run_cells",
        [chip, str(table), fast],
        folder,
        timeout=1500,
        environment={"TRITON_CACHE_DIR": str(folder / "cache")},
    )
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def check(found: list[dict[str, str]]) -> None:
    for row in found:
        assert int(row["shared"]) <= int(row["limit"]), row
        assert row["kernels"] or row["instead"], row
        assert "Error" not in row["instead"], row  # selected, and refused only when launched


@pytest.mark.parametrize("chip", ["sm_75", "sm_86", "sm_120", "gfx1100"])
def test_one_configuration_of_each_op(chip: str, tmp_path: Path) -> None:
    found = rows(chip, tmp_path, fast=True)
    check(found)
    assert len(found) >= 10


def test_a_kernel_that_the_chip_refuses_is_replaced_in_training(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    printed = run_function(
        "tests.helpers.chip_cells:run_refused",
        ["sm_90"],
        tmp_path,
        environment={"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    auto, torch_only, reason = printed.strip().splitlines()
    assert auto.startswith("auto 1 rank_gradients (float16, rank up to 16): expected a kernel")
    assert "Hardware limit: 16384" in auto
    assert torch_only == "torch 0"
    assert reason.startswith("rank_gradients does not run on cpu: _gradients_kernel: OutOfResou")


def test_launches_of_an_adapted_layer(tmp_path: Path) -> None:
    """A budget: W is dequantised once each way, and one pass gives both rank gradients."""
    pytest.importorskip("triton")
    printed = run_function(
        "tests.helpers.chip_cells:run_layer",
        ["sm_86"],
        tmp_path,
        environment={"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    backward = "dequantize_kernel gradients_kernel sum_kernel sum_kernel"
    assert printed.strip() == f"dequantize_kernel | {backward}"


def test_kernels_receive_no_strided_tensors(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    printed = run_function(
        "tests.helpers.chip_cells:run_strided",
        ["sm_90"],
        tmp_path,
        environment={"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert len(printed.split()) == 8, printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chip", GPUS)
def test_every_decision(chip: str, tmp_path: Path) -> None:
    """As in the committed table, up to the bytes, which follow Triton's version."""
    found = rows(chip, tmp_path, fast=False)
    check(found)
    with RESULTS.open(newline="") as file:
        committed = [row for row in csv.DictReader(file) if row["chip"] == chip]
    told = [{k: row[k] for k in ("cell", "kernels", "instead")} for row in committed]
    assert [{k: row[k] for k in ("cell", "kernels", "instead")} for row in found] == told


def test_the_committed_table_holds_every_cell_of_every_chip() -> None:
    with RESULTS.open(newline="") as file:
        found = list(csv.DictReader(file))
    check(found)
    names = [cell.name for cell in cells()]
    assert [(row["chip"], row["cell"]) for row in found] == [(c, n) for c in GPUS for n in names]


def launches(source: str) -> int:
    """Number of calls of the form ``kernel[grid](...)``."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return sum(isinstance(call.func, ast.Subscript) for call in calls)


def test_launches_go_through_one_function() -> None:
    package = Path(__file__).parents[2] / "triton_kernels" / "lightning_peft_kernels"
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    found = {name: launches(path.read_text("utf-8")) for name, path in files.items()}
    assert {name: n for name, n in found.items() if n} == {"launch.py": 2}
    assert launches("kernel[(1,)](x)\nkernels[i][grid](x, y, BLOCK=4)") == 2
