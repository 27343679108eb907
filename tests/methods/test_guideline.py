"""The guideline names methods that exist and says of them what holds."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_peft.guideline.advice import GUIDELINE, guideline_table
from lightning_peft.guideline.measurements import MEASURED
from lightning_peft.methods import literature
from lightning_peft.methods.registry import METHODS


@pytest.mark.parametrize("row", GUIDELINE, ids=lambda row: row.method)
def test_rows(row) -> None:
    assert row.method in METHODS
    assert row.latency == METHODS[row.method].mergeable
    assert row.source.startswith(("arXiv:", "OpenReview:"))


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
    small = [r.method for r in literature("generation", budget=0.05, latency=True)]
    assert small[:2] == ["IA3", "VeRA"]
    assert set(small[2:]) == {"VBLoRA", "UniLoRA", "TinyLoRA", "FourierFT", "NormTuning", "BEFT"}
    assert all(r.multi_task for r in literature(multi_task=True))
    assert literature() == list(GUIDELINE)
    with pytest.raises(ValueError, match="task"):
        literature("speech")
    with pytest.raises(ValueError, match="budget"):
        literature(budget=0)


def test_rows_by_sample_hold() -> None:
    """`multi_task` says of a weight method what a batch of two adapters shows."""
    import torch
    from torch import nn

    import lightning_peft as lp
    from tests.helpers.method_cases import CASES

    said = {row.method: row.multi_task for row in GUIDELINE}
    seen = set()
    for case in CASES:
        label = case.method.label
        if label in seen or not said.get(label, False) or "linear" in case.skip:
            continue
        seen.add(label)
        model = nn.Sequential(nn.Linear(16, 8))
        for name in "ab":
            lp.attach(
                model, dataclasses.replace(case.method, target_modules=["0"]), adapter_name=name
            )
        lp.set_adapter(model, ["a", "b"])
        with lp.adapter_names(["a", "b"]):
            assert model(torch.randn(2, 16)).shape == (2, 8)
    assert len(seen) > 20
