"""A table on the screen; with --keep also docs/results/NAME.md, with command, date and versions."""

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PACKAGES = "torch", "lightning", "transformers", "lightning-peft"


def parser(story: str | None) -> argparse.ArgumentParser:
    """What every example takes."""
    made = argparse.ArgumentParser(description=story)
    made.add_argument("--smoke", action="store_true", help="a few seconds: shows that it runs")
    made.add_argument("--keep", action="store_true", help="write the page in docs/results")
    return made


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean of the seeds, and half the distance between the best and the worst."""
    return f"{sum(values) / len(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def show(story: str, text: str, keep: bool, figure: Any = None) -> None:
    """Print; keep the page, and the picture beside it, under the script's name."""
    print(f"\n{text}", flush=True)
    if not keep:
        return
    name = Path(sys.argv[0]).stem
    command = f"python examples/{name}.py {' '.join(a for a in sys.argv[1:] if a != '--keep')}"
    versions = ", ".join(f"{p} {version(p)}" for p in PACKAGES)
    where = f"{datetime.date.today()}, {os.cpu_count()} CPU cores, Python {sys.version.split()[0]}"
    picture = ""
    if figure is not None:
        (DOCS / "figures").mkdir(exist_ok=True)
        figure.savefig(DOCS / "figures" / f"{name}.png", dpi=90, bbox_inches="tight")
        picture = f"\n![{name}](../figures/{name}.png)\n"
    page = f"# {story}\n\n{text}\n{picture}\n`{command.strip()}`\n\n{where}; {versions}.\n"
    (DOCS / "results").mkdir(exist_ok=True)
    (DOCS / "results" / f"{name}.md").write_text(page, "utf-8")
