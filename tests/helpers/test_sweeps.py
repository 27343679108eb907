"""A sweep keeps its share, covers every value, and does not depend on the order of the cases."""

from __future__ import annotations

from tests.helpers.sweeps import quick_cases

GRID = [(f"test[{a}-{b}]", {"a": a, "b": b}) for a in range(12) for b in range(5)]


def test_share_and_coverage() -> None:
    kept = quick_cases(GRID, 0.4)
    assert len(kept) == 0.4 * len(GRID)
    values = [v for name, v in GRID if name in kept]
    assert {v["a"] for v in values} == set(range(12))
    assert {v["b"] for v in values} == set(range(5))
    assert kept == quick_cases(GRID[::-1], 0.4)


def test_every_value_stays_even_in_a_tiny_share() -> None:
    kept = quick_cases(GRID, 0.0)
    assert 12 <= len(kept) < len(GRID) / 2
