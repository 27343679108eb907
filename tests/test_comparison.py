"""The comparison of methods: intervals, choices on validation data, resuming."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest

from benchmarks.compare.intervals import Difference, paired
from benchmarks.compare.protocol import append, chosen, complete, lines, tasks_of, trials
from benchmarks.compare.rows import FACTORS, LEFT_OUT, ROWS, learning_rates
from benchmarks.compare.tasks import TASKS
from lightning_peft.methods import METHODS


def test_an_interval_is_paired() -> None:
    """Seeds differ by 20 points, the rows by 1 ± 0.1: pairing finds it."""
    full = {s: 60.0 + 2 * s for s in range(10)}
    own = {s: v - 1 + 0.1 * (-1) ** s for s, v in full.items()}
    found = paired(own, full)
    assert found is not None
    assert found.mean == pytest.approx(-1)
    assert -1.1 <= found.low < found.mean < found.high <= -0.9
    assert found.verdict(1.2) == "equal"
    assert found.verdict(0.5) == "worse"
    assert found.verdict(0.5, higher=False) == "better"


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    import random

    luck = random.Random(1)
    covered = 0
    for _ in range(60):
        own = {s: luck.gauss(0, 1) for s in range(10)}
        found = paired(own, dict.fromkeys(own, 0.0))
        assert found is not None
        covered += found.low <= 0 <= found.high
    assert 48 <= covered <= 60


def test_few_seeds_decide_nothing() -> None:
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert Difference(0.0, 0.0, 0.0, 1).verdict(1.0) == "one seed"
    assert Difference(0.0, -3.0, 3.0, 3).verdict(1.0) == "undecided"


def test_every_row_has_the_same_number_of_trials() -> None:
    for row in ROWS:
        for task in tasks_of(row, list(TASKS)):
            rates = learning_rates(row, task)
            assert len(set(rates)) == len(FACTORS) == 6
            assert statistics.median(rates) >= rates[0], "the centre comes first"


def test_every_method_has_a_row_or_a_reason() -> None:
    given = [
        m for row in ROWS for m in (row.method if isinstance(row.method, tuple) else [row.method])
    ]
    compared = {type(m).__name__ for m in given if m is not None}
    assert not compared & set(LEFT_OUT)
    compared |= {"Full"} if any(row.reference == "full" for row in ROWS) else set()
    assert {cls.__name__ for cls in METHODS.values()} == compared | set(LEFT_OUT)


def test_front_rows_run_on_all_tasks_and_peers_share_their_seeds() -> None:
    front = [r.name for r in ROWS if r.front]
    assert {"LoRA", "LoRA on NF4", "peft: LoRA", "full, same layers"} <= set(front)
    assert len({r.name for r in ROWS}) == len(ROWS)
    jobs = list(trials([r for r in ROWS if r.front], list(TASKS)))
    assert len(jobs) == len(front) * len(TASKS) * len(FACTORS)


def test_the_rate_is_chosen_on_validation_scores() -> None:
    found = [
        {"row": "LoRA", "task": "language", "learning_rate": "0.01", "score": "31.0"},
        {"row": "LoRA", "task": "language", "learning_rate": "0.02", "score": "30.0"},
        {"row": "LoRA", "task": "language", "learning_rate": "0.04", "score": ""},
        {"row": "DoRA", "task": "language", "learning_rate": "0.08", "score": "1.0"},
    ]
    assert chosen(found, "LoRA", TASKS["language"]) == 0.02
    assert chosen(found, "LoRA", TASKS["text"]) is None


def test_a_row_that_is_there_is_not_run_again(tmp_path: Path) -> None:
    row = next(r for r in ROWS if r.name == "LoRA")
    path = tmp_path / "trials.csv"
    append(path, {"row": row.name, "task": "text", "learning_rate": "0.002", "seed": "100"})
    jobs = iter([(row, "text", 0.002, 100, "validation")])
    assert complete(jobs, path, {}, until=float("inf"))
    assert len(lines(path)) == 1
    late = iter([(row, "text", 0.004, 100, "validation")])
    assert not complete(late, path, {}, until=0.0)


@pytest.mark.slow
def test_a_task_end_to_end(tmp_path: Path) -> None:
    """Two rows and two seeds of the vision task; a second call adds nothing."""
    from tests.helpers.forks import run_script

    script = Path(__file__).parent.parent / "benchmarks" / "compare" / "protocol.py"
    given = ["--tasks", "vision", "--rows", "LoRA", "full, same layers", "--seeds", "2"]
    given += ["--results", str(tmp_path), "--work", str(tmp_path)]
    for _ in range(2):
        run_script(script, given, tmp_path)
        with (tmp_path / "compare_runs.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 4
        assert all(float(r["score"]) > 25 for r in rows), "better than chance, 20 %"
        assert len(lines(tmp_path / "compare_trials.csv")) == 12
