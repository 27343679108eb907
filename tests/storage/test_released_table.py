"""The tables of docs/released-weights.md say what the tests check, no more and no less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.released import RELEASED
from tests.hf import test_damaged_checkpoints
from tests.hf.test_load_packed import QUANTIZERS
from tests.storage import test_adopted, test_released
from tests.storage.test_torchao import STAND_INS

PAGE = Path(__file__).parents[2] / "docs" / "released-weights.md"

#: Column → formats of the tests.
COLUMNS = {
    "FP8": ["fp8", "fp8 ue8m0", "fp8 static", "fp8 ue8m0 in fp32"],
    "FP8 experts": ["fp8 experts", "mxfp8", "fp8 per-tensor experts"],
    "FP4 experts, MXFP4": ["fp4 experts", "mxfp4"],
    "int4, int8, FP8, NVFP4 (compressed-tensors)": [
        "int4", "int4 experts", "int4 zero points", "int8", "fp8 rows", "nvfp4"
    ],
    "NVFP4, FP8 (modelopt)": ["modelopt nvfp4", "modelopt nvfp4 experts", "modelopt fp8"],
    "AWQ, GPTQ": [
        "awq", "awq experts", "gptq", "gptq_v2", "gptq experts", "gptq desc_act"
    ],
    "int8, FP8 (torchao)": ["torchao int8", "torchao fp8"],
}  # fmt: skip

#: Row → tests over all formats.
ROWS = {
    "output and gradients, fp32 and bf16": [
        test_released.test_trains_as_the_dequantised_model, test_released.test_half_precision
    ],
    "no dense copy kept for backward": [test_released.test_no_dense_copy_is_kept],
    "saved again without a change of a bit": [test_released.test_saved_unchanged],
    "merge to dense, save, load; unmerge exact": [test_released.test_merge_to_dense_and_back],
    "merge into the format, save, load": [test_released.test_merge_into_the_format],
    "`merge_and_unload` gives the library's classes": [test_released.test_merge_and_unload],
    "adapter loads in peft on the dequantised model": [test_released.test_exchange],
    "Trainer run, file of adapters, exact resume": [test_released.test_trainer],
    "report and planner count the file's bytes": [test_released.test_report_and_plan],
    "deepcopy, pickle, casts; detached as loaded": [test_released.test_copies],
    "inside of accelerate's hooks": [test_released.test_hooks_of_accelerate],
    "`torch.compile(fullgraph=True)`": [test_released.test_compiled],
    "damaged files refused by name": [
        test_damaged_checkpoints.test_missing_scales,
        test_damaged_checkpoints.test_misshapen_scales,
        test_damaged_checkpoints.test_codes_of_another_shape,
        test_damaged_checkpoints.test_truncated_files,
        test_damaged_checkpoints.test_unknown_method,
    ],
}  # fmt: skip
ADOPTED = "layers that another library made are taken over"


def table(heading: str) -> dict[str, list[str]]:
    """First cell → other cells of the table whose head begins with `heading`."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = rest
    return rows


def formats_of(test: Any) -> set[str]:
    (mark,) = (m for m in test.pytestmark if m.name == "parametrize" and m.args[0] == "name")
    return {getattr(value, "values", (value,))[0] for value in mark.args[1]}


def test_every_format_is_a_column() -> None:
    assert table("check")["check"] == list(COLUMNS)
    assert sorted(name for names in COLUMNS.values() for name in names) == sorted(RELEASED)


@pytest.mark.parametrize("row", ROWS)
def test_every_mark_is_a_test(row: str) -> None:
    assert table("check")[row] == ["✓"] * len(COLUMNS)
    for test in ROWS[row]:
        assert formats_of(test) == set(RELEASED)


def test_adopted_layers() -> None:
    rows = table("check")
    assert {row for row in rows if "---" not in row} == {"check", *ROWS, ADOPTED}
    names = {*test_adopted.NAMES, *(f"torchao {n.replace('oat', 'p')}" for n in STAND_INS)}
    marks = ["✓" if names & set(formats) else "–" for formats in COLUMNS.values()]
    assert rows[ADOPTED] == marks


def test_every_quantizer_of_transformers() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    told = {
        name.strip(" `"): fate
        for fate, (cell,) in list(table("what becomes of it").items())[2:]
        for name in cell.split(",")
        if "`" in name
    }
    every = {*AUTO_QUANTIZER_MAPPING, *QUANTIZERS} - {"lightning_peft"}
    assert told == {name: QUANTIZERS.get(name, "refused") for name in every}
