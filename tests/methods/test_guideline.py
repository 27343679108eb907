"""The guideline names methods that exist and says of them what holds."""

from __future__ import annotations

import pytest

from lightning_peft.methods import recommend
from lightning_peft.methods.base import METHODS
from lightning_peft.methods.guideline import GUIDELINE


@pytest.mark.parametrize("row", GUIDELINE, ids=lambda row: row.method)
def test_rows(row) -> None:
    assert row.method in METHODS
    assert row.latency == METHODS[row.method].mergeable
    assert row.source.startswith("arXiv:")


def test_filters() -> None:
    assert [r.method for r in recommend("generation", budget=0.05, latency=True)] == ["IA3", "VeRA"]
    assert all(r.multi_task for r in recommend(multi_task=True))
    assert recommend() == list(GUIDELINE)
    with pytest.raises(ValueError, match="task"):
        recommend("speech")
    with pytest.raises(ValueError, match="budget"):
        recommend(budget=0)
