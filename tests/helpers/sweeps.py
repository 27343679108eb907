"""`@pytest.mark.sweep(share)`: a quick run keeps a seeded share of a test's cases.

The other cases are marked slow, so `make test-all` runs them. Every value of every parameter keeps
at least one case in the quick run.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import pytest

__all__ = ["mark_slow_cases", "quick_cases"]

SEED = 20


def quick_cases(cases: Sequence[tuple[str, dict[str, Any]]], share: float) -> set[str]:
    """Return the ids of the cases that a quick run keeps.

    Args:
        cases: Id and parameter values of each case.
        share: Fraction to keep, if the values of the parameters do not need more.
    """
    drawn = sorted(cases, key=lambda case: zlib.crc32(f"{SEED} {case[0]}".encode()))
    kept: set[str] = set()
    covered: set[tuple[str, Any]] = set()
    for name, values in drawn:
        if values.items() - covered:
            kept.add(name)
            covered |= values.items()
    for name, _ in drawn:
        if len(kept) < share * len(cases):
            kept.add(name)
    return kept


def values_of(case: pytest.Function) -> dict[str, str]:
    return {name: repr(value) for name, value in case.callspec.params.items()}


def mark_slow_cases(items: Sequence[pytest.Item]) -> None:
    """Mark the cases slow that their test's sweep leaves out."""
    tests: dict[Any, list[pytest.Function]] = {}
    for item in items:
        # A case that is slow already is no part of the choice.
        chosen = item.get_closest_marker("sweep") and not item.get_closest_marker("slow")
        if chosen and isinstance(item, pytest.Function):
            tests.setdefault(item.function, []).append(item)
    for cases in tests.values():
        marker = cases[0].get_closest_marker("sweep")
        assert marker is not None
        kept = quick_cases([(c.name, values_of(c)) for c in cases], marker.args[0])
        for case in cases:
            if case.name not in kept:
                case.add_marker(pytest.mark.slow)
