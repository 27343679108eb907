"""A result of `bench` as one line of JSON, and as one row of a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_peft.diagnostics.bench_rows import Found, Row

__all__ = ["COLUMNS", "BenchResult", "markdown_row", "markdown_table"]

_VERSION = 1


@dataclass(frozen=True)
class BenchResult:
    """All that one run of `bench` found.

    Attributes:
        environment: Device, capability, driver, versions of packages, date.
        sizes: What was measured.
        kernels: Number of kernels checked on the device, and which of them are not used.
        rows: Value or reason by name; units are those of `Row`.
        version: Version of this form.
    """

    environment: dict[str, str]
    sizes: dict[str, Any]
    kernels: dict[str, Any]
    rows: dict[str, dict[str, Found]] = field(default_factory=dict)
    version: int = _VERSION

    @classmethod
    def of(
        cls,
        environment: Mapping[str, str],
        sizes: Mapping[str, Any],
        kernels: Mapping[str, Any],
        rows: Sequence[Row],
    ) -> BenchResult:
        """Make a result of measured rows."""
        found = {row.name: {"value": row.value, "unit": row.unit} for row in rows}
        return cls(dict(environment), dict(sizes), dict(kernels), found)

    def line(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, line: str) -> BenchResult:
        """Return the result of a line.

        Raises:
            ValueError: The line is not one of `bench`, or of a version that is not known.
        """
        try:
            given = json.loads(line)
            if not isinstance(given, dict) or given.get("version") != _VERSION:
                raise ValueError(f"version {given.get('version') if given else given!r}")
            made = cls(**given)
            for name, row in made.rows.items():
                if set(row) != {"value", "unit"} or not isinstance(row["value"], float | int | str):
                    raise ValueError(f"row {name!r}: {row}")
            made.environment["device"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"bench: expected one line as `python -m lightning_peft bench` prints it, version "
                f"{_VERSION}, got {line[:60]!r} ({error}); run bench again"
            ) from None
        return made

    def value(self, name: str) -> float | None:
        """Return a measured number; None if it is a reason or absent."""
        found = self.rows.get(name, {}).get("value")
        return float(found) if isinstance(found, float | int) else None


#: Titles of the table.
COLUMNS = (
    "device", "software", "step, ms", "against peft + bitsandbytes", "against bf16 LoRA",
    "peak, GiB: ours / bitsandbytes / bf16", "dequantise, of copy", "decode 1 / 8 / 32, ms",
    "against peft + bitsandbytes", "as a CUDA graph, ms", "8-bit optimizer, ms",
    "experts, ms", "against peft bf16", "kernels",
)  # fmt: skip


def markdown_row(result: BenchResult) -> str:
    """Return the row of a result; "–" where nothing was measured."""
    return "| " + " | ".join(_cells(result)) + " |"


def markdown_table(results: Sequence[BenchResult]) -> str:
    """Return titles and one row per result."""
    head = "| " + " | ".join(COLUMNS) + " |"
    rule = "| " + " | ".join(["---"] + ["---:"] * (len(COLUMNS) - 1)) + " |"
    return "\n".join([head, rule, *(markdown_row(result) for result in results)])


def _cells(result: BenchResult) -> list[str]:
    about, value = result.environment, result.value
    software = " ".join(
        f"{n} {about[n]}" for n in ("torch", "triton", "bitsandbytes") if n in about
    )
    theirs, dense = "peft + bitsandbytes", "peft bf16"
    batches = (1, 8, 32)
    bad = result.kernels.get("bad", [])
    return [
        " ".join(filter(None, (about["device"], about.get("capability", "")))),
        software,
        _number(value("step, ours")),
        _times(value(f"step, {theirs}"), value("step, ours")),
        _times(value(f"step, {dense}"), value("step, ours")),
        " / ".join(_number(value(f"peak memory, {n}")) for n in ("ours", theirs, dense)),
        _number(value("dequantise")),
        " / ".join(_number(value(f"decode {b}, ours")) for b in batches),
        " / ".join(
            _times(value(f"decode {b}, {theirs}"), value(f"decode {b}, ours")) for b in batches
        ),
        " / ".join(_number(value(f"decode {b}, ours as a CUDA graph")) for b in batches),
        _number(value("optimizer, ours 8-bit")),
        _number(value("experts, ours")),
        _times(value("experts, peft bf16"), value("experts, ours")),
        f"{result.kernels.get('checked', 0)} checked, {len(bad)} not used",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _times(other: float | None, ours: float | None) -> str:
    return "–" if other is None or not ours else f"{other / ours:.2f} ×"
