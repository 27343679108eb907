"""Tables of Markdown, and the CSV files that they come from."""

from __future__ import annotations

import csv
import re
from pathlib import Path

__all__ = ["ECOSYSTEM", "MISSING", "RESULTS", "ROOT", "origin", "read", "read_rows", "table"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ECOSYSTEM = ROOT / "tests" / "ecosystem" / "results.csv"
MISSING = "*not measured*"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table: columns of numbers to the right, columns of text to the left."""
    sides = [
        "---:" if i and rows and all(_is_number(row[i]) for row in rows) else ":---"
        for i in range(len(columns))
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, sides, *rows])


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+±≤\d.,:%\s]*", cell) is not None


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of one of the benchmarks' CSV files; none if it is missing."""
    return read_rows(RESULTS / f"{name}.csv")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if it is missing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def origin(rows: list[dict[str, str]], *fields: str) -> str:
    """Return a line below a table with the different values of some fields."""
    said = [", ".join(sorted({r[f] for r in rows if r.get(f)})) for f in fields]
    return "\n\n" + "; ".join(s for s in said if s) + "."
