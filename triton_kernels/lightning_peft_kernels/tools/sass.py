"""Counts machine instructions of compiled kernels, in the loop that decides their speed.

    python -m lightning_peft_kernels.tools.sass [--csv FILE]

prints, for the kernels whose `aot_specs` say how many elements one turn of their loop takes, the
instructions per element (of all threads, as one issues them), global loads, look-ups in shared
memory and barriers per turn. A kernel without a loop is counted as a whole. A static count is a
ceiling for a kernel's speed and the same on every machine: it serves as a regression row.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_peft_kernels.tools.aot import compile_kernel, cuobjdump, specs
from lightning_peft_kernels.tools.targets import TARGETS, why_left_out

__all__ = ["Budget", "budget", "budgets", "hot_loop"]

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?(\S+?)(?:\.\S+)?(?:\s+(.*?))?\s*;", re.M
)
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Budget:
    """Counts of one kernel on one target, per turn of its longest loop.

    Attributes:
        kernel: Name and configuration.
        target: One of `TARGETS`.
        elements: Elements that a program takes per turn.
        instructions: Instructions per thread.
        per_element: Instructions of all threads per element.
        global_loads: LDG and LDGSTS per thread.
        lookups: LDS per thread.
        barriers: BAR per thread.
    """

    kernel: str
    target: str
    elements: int
    instructions: int
    per_element: float
    global_loads: int
    lookups: int
    barriers: int


def hot_loop(sass: str) -> list[str]:
    """Return the opcodes of the longest loop, or of the whole kernel if it has none."""
    found = [(int(at, 16), op, rest or "") for at, op, rest in _LINE.findall(sass)]
    best: list[str] = []
    for at, op, rest in found:
        label = _TARGET.search(rest) if op == "BRA" else None
        start = int(label[1], 16) if label else at
        if start < at:  # a branch backwards
            body = [name for place, name, _ in found if start <= place <= at]
            best = max(best, body, key=len)
    return best or [op for _, op, _ in found]


def budget(spec: Mapping[str, Any], target: str) -> Budget:
    """Compile a configuration and count."""
    kernel = compile_kernel(spec, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = cuobjdump("-sass", file.name)
    ops = Counter(hot_loop(sass))
    total, elements = sum(ops.values()), int(spec["weights"])
    threads = 32 * int(spec["num_warps"])
    return Budget(
        spec["name"], target, elements, total, round(total * threads / elements, 2),
        ops["LDG"] + ops["LDGSTS"], ops["LDS"], ops["BAR"],
    )  # fmt: skip


def budgets(only: str = "", target: str = "") -> Iterator[Budget]:
    """Yield the budgets of every kernel that names its elements, on every NVIDIA target."""
    for spec in specs():
        if not spec.get("weights") or only not in spec["name"]:
            continue
        for name, at in TARGETS.items():
            if at.backend == "cuda" and target in ("", name) and not why_left_out(spec, at.chip):
                yield budget(spec, name)


def main() -> int:
    """Print the table and write it to a file."""
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    given = parser.parse_args()
    rows = []
    for row in budgets():
        rows.append({**asdict(row), "triton": triton.__version__})
        print(*rows[-1].values(), flush=True)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            out = csv.DictWriter(file, [*(f.name for f in fields(Budget)), "triton"])
            out.writeheader()
            out.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
