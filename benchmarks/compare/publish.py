"""Writes the package's measurements, `lightning_peft/guideline/measurements.py`, from CSV files.

    python -m benchmarks.compare.publish

A task comes from results/compare_runs.csv once its reference has `READY` seeds there. Until then
the earlier comparison, results/compare_methods.csv, stays: three seeds, with learning rates chosen
on the scores it reports. Its rows are marked ``"exploratory"``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare.intervals import paired
from benchmarks.compare.protocol import RESULTS, lines

PACKAGE = Path(__file__).parents[2] / "lightning_peft" / "guideline" / "measurements.py"
READY = 5
REFERENCES = ("full, same layers", "full fine-tuning")
#: Tasks of the earlier comparison, and the task of the protocol that replaces each.
EARLIER = {"classification": "text", "language": "language"}
HEAD = '''"""Written by ``python -m benchmarks.compare.publish`` from its results."""

from __future__ import annotations

from lightning_peft.guideline.measurement import Measured

__all__ = ["MEASURED", "Measured"]

# fmt: off
MEASURED: tuple[Measured, ...] = (
'''


class Line(NamedTuple):
    """The runs of a row on a task."""

    task: str
    row: str
    metric: str
    higher: bool
    scores: dict[int, float]
    rate: float
    settings: str
    percent: float
    peak_mb: float
    nbytes: int
    step_ms: float | None
    protocol: str

    @property
    def classes(self) -> list[str]:
        """Names of the methods' classes, sorted."""
        return sorted(re.findall(r"(?:^|; )(\w+)\(", self.settings))

    @property
    def mergeable(self) -> bool:
        """Whether every method of the row merges."""
        from lightning_peft.methods.registry import METHODS

        return bool(self.classes) and all(METHODS[c].mergeable for c in self.classes)


def collected() -> list[Line]:
    """Return the rows of all tasks, those of the protocol where they are ready."""
    own = list(_protocol())
    ready = {
        x.task for x in own if x.row in REFERENCES and len(x.scores) >= READY
    }  # fmt: skip
    earlier = [x for x in _earlier() if EARLIER[x.task] not in ready]
    return earlier + [x for x in own if x.task in ready]


def _protocol() -> Iterator[Line]:
    times = {
        (x["task"], x["row"]): float(x["step_ms"]) for x in lines(RESULTS / "compare_steps.csv")
    }
    by_row: dict[tuple[str, str], list[dict[str, str]]] = {}
    for x in lines(RESULTS / "compare_runs.csv"):
        if x["score"]:
            by_row.setdefault((x["task"], x["row"]), []).append(x)
    for (task, row), own in by_row.items():
        first = own[0]
        yield Line(
            task, row, first["metric"], first["metric"].startswith("accuracy"),
            {int(x["seed"]): float(x["score"]) for x in own}, float(first["learning_rate"]),
            first["settings"], float(first["percent"]), float(first["peak_mb"]),
            int(first["bytes"]), times.get((task, row)), "held-out",
        )  # fmt: skip


def _earlier() -> Iterator[Line]:
    times = {
        (x["task"], x["method"]): float(x["step_ms"])
        for x in lines(RESULTS / "compare_methods_timing.csv")
    }
    by_row: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    for x in lines(RESULTS / "compare_methods.csv"):
        rates = by_row.setdefault((x["task"], x["method"]), {})
        rates.setdefault(x["learning_rate"], []).append(x)
    for (task, row), rates in by_row.items():
        own = max(rates.values(), key=len)
        first = own[0]
        yield Line(
            task, row, first["score_name"], first["score_name"] == "accuracy",
            {int(x["seed"]): float(x["score"]) for x in own}, float(first["learning_rate"]),
            first["settings"], float(first["percent"]), float(first["peak_mb"]),
            int(first["adapter_bytes"]), times.get((task, row)), "exploratory",
        )  # fmt: skip


def references(found: list[Line]) -> dict[str, Line]:
    """Return the reference of each task: full fine-tuning of the layers that adapters change."""
    made: dict[str, Line] = {}
    for name in reversed(REFERENCES):
        made.update({x.task: x for x in found if x.row == name})
    return made


def tied(found: list[Line]) -> set[tuple[str, str]]:
    """Return (task, row) of the rows that cannot be told from the best mergeable row."""
    made = set()
    for task in dict.fromkeys(x.task for x in found):
        own = [x for x in found if x.task == task and x.mergeable]
        if not own:
            continue
        sign = 1 if own[0].higher else -1
        best = max(own, key=lambda x: sign * statistics.mean(x.scores.values()))
        for x in own:
            gap = paired(x.scores, best.scores)
            if x is best or (gap is not None and gap.low <= 0 <= gap.high):
                made.add((task, x.row))
    return made


def entries(found: list[Line]) -> Iterator[list[Any]]:
    """Yield the fields of `Measured`, row by row."""
    reference, same = references(found), tied(found)
    for x in found:
        if not x.classes or x.task not in reference:
            continue
        full = reference[x.task]
        gap = paired(x.scores, full.scores)
        if gap is None:
            continue
        score = round(statistics.mean(x.scores.values()), 2)
        yield [
            x.task, "+".join(x.classes), x.row, x.metric, score,
            round(gap.mean, 2), round(gap.low, 2), round(gap.high, 2), len(x.scores), x.percent,
            x.peak_mb, x.nbytes, x.step_ms, x.rate, float(f"{x.rate / full.rate:.3g}"), x.settings,
            (x.task, x.row) in same, x.protocol,
        ]  # fmt: skip


def main() -> None:
    """Write the file."""
    text = HEAD
    for values in entries(collected()):
        shown = [json.dumps(v) if isinstance(v, str) else repr(v) for v in values]
        text += "    Measured(" + ", ".join(shown[:5]) + ",\n"
        text += "             " + ", ".join(shown[5:15]) + ",\n"
        text += "             " + ", ".join(shown[15:]) + "),\n"
    PACKAGE.write_text(text + ")\n", encoding="utf-8")
    print(f"{PACKAGE}: {text.count('Measured(')} rows")


if __name__ == "__main__":
    main()
