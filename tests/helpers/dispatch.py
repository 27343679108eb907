"""Overrides of dispatch rules, to run on a CPU what only a GPU selects."""

from __future__ import annotations

import pytest
from lightning_peft_kernels.dispatch import Decision
from lightning_peft_kernels.experts.groups import Groups

from lightning_peft.storage.nf4 import fused

__all__ = ["count_on_host", "group_projections"]

_select_group = fused.select_group


def count_on_host(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    """Have the host count the rows of experts, or never."""
    monkeypatch.setattr(Groups, "on_host", property(lambda self: value))


def group_projections(together: bool | None) -> None:
    """Compute layers over one input as one, apart, or (None) as the rule selects."""
    if together is None:
        fused.select_group = _select_group
        return
    decision = Decision("grouped" if together else "apart", "forced by a test")
    fused.select_group = lambda *args: decision
