"""The guideline names methods that exist and says of them what holds."""

from __future__ import annotations

import pytest

from lightning_peft.guideline.guideline import GUIDELINE, guideline_table
from lightning_peft.guideline.measurements import MEASURED
from lightning_peft.methods import literature
from lightning_peft.methods.registry import METHODS


@pytest.mark.parametrize("row", GUIDELINE, ids=lambda row: row.method)
def test_rows(row) -> None:
    assert row.method in METHODS
    assert row.latency == METHODS[row.method].mergeable
    assert row.source.startswith("arXiv:")


def test_what_was_measured_stands_beside() -> None:
    for m in MEASURED:
        assert set(m.method.split("+")) <= set(METHODS)
        assert m.seeds >= 1
        assert 0 < m.percent <= 100
    table = guideline_table(literature("generation"))
    assert table.count("\n") == 1 + len(literature("generation"))
    (lora,) = [line for line in table.splitlines() if line.startswith("| LoRA |")]
    for m in next(r for r in GUIDELINE if r.method == "LoRA").measured:
        assert str(m) in lora


def test_filters() -> None:
    assert [r.method for r in literature("generation", budget=0.05, latency=True)] == [
        "IA3",
        "VeRA",
    ]
    assert all(r.multi_task for r in literature(multi_task=True))
    assert literature() == list(GUIDELINE)
    with pytest.raises(ValueError, match="task"):
        literature("speech")
    with pytest.raises(ValueError, match="budget"):
        literature(budget=0)
