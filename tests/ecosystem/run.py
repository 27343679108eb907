"""Fine-tunes inside packages of others: one environment per package, from PyPI.

    python tests/ecosystem/run.py                    # all
    python tests/ecosystem/run.py darts lightly
    python tests/ecosystem/run.py --folder /tmp/eco  # keeps the environments for the next call

One base environment has the tested torch and both Lightning packages. The environment of a package
sees it behind its own site-packages, so that what the package pins comes first. Each job runs LoRA
and LoRA over NF4 (see `jobs/checks.py`). The rows go into results.csv, from which docs/ecosystem.md
is made; rows of other packages stay.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
JOBS, RESULTS = FOLDER / "jobs", FOLDER / "results.csv"
#: What a job installs, where it is not the package of its name alone.
WANTED = {
    "anomalib": ["anomalib", "torchvision"],
    "asteroid": ["asteroid"],
    "deepforest": ["deepforest", "torchvision"],
    "gluonts": ["gluonts[torch]"],
    "lightly": ["lightly", "torchvision"],
    "lightly_train": ["lightly-train", "timm", "torchvision"],
    "lightning_bolts": ["lightning-bolts>=0.7", "torchvision", "setuptools<81"],
    "pytorch_forecasting": ["pytorch-forecasting"],
    # pip otherwise goes back to a release whose metadata are no longer valid.
    "pytorch_tabular": ["pytorch_tabular>=1.2", "requests"],
    "scvi_tools": ["scvi-tools"],
    "timm": ["timm", "torchvision"],
    "torchgeo": ["torchgeo", "torchvision", "requests"],
    "torch_spatiotemporal": ["torch-spatiotemporal"],
}
#: Packages that pin another Lightning, which goes into their own environment.
OWN_LIGHTNING = ("lightning_bolts",)
PINS = ("torch", "lightning", "pytorch-lightning")
OURS = ["numpy", "rich", "safetensors", "typing-extensions"]
SECONDS = 900
STAGES = ("train", "resume", "load", "predict", "merge")
FIELDS = [
    "package", "version", "lightning", "model", "entry", "storage", "argument", "adapted", "packed",
    "trained", "total", *STAGES, "remark", "date",
]  # fmt: skip


class Environments:
    """Environments below one folder; those that are there are used again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def constraints(self, names: Sequence[str]) -> Path:
        """Write the tested versions of these packages to a file."""
        tested = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        kept = [line for line in tested if line.partition("==")[0] in names]
        path = self.folder / f"{'-'.join(names)}.txt"
        path.write_text("\n".join(kept) + "\n")
        return path

    def python(self, name: str, wanted: list[str], behind: Path | None = None) -> Path:
        """Make an environment and return its interpreter.

        Raises:
            RuntimeError: pip's last lines.
        """
        made = self.folder / name
        python, done = made / "bin" / "python", made / "installed"
        if done.exists():
            return python
        venv.create(made, with_pip=True)
        if behind is not None:
            packages = next((made / "lib").iterdir()) / "site-packages"
            (packages / "zz_base.pth").write_text(f"{behind}\n")
        pins = self.constraints(("torch",) if name in OWN_LIGHTNING else PINS)
        command = [
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-warn-conflicts", "-c", str(pins), *wanted,
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if ran.returncode:
            lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
            raise RuntimeError(" ".join(lines[:2]) or ran.stderr[-300:])
        done.touch()
        return python

    def site_packages(self, name: str) -> Path:
        return next((self.folder / name / "lib").iterdir()) / "site-packages"


def run(job: str, environments: Environments) -> list[dict[str, object]]:
    """Make the environment, run the job and return its rows."""
    package = WANTED.get(job, [job])[0]
    name = re.split(r"[\[<>=]", package)[0]
    row: dict[str, object] = {"package": name, "date": date.today().isoformat()}
    try:
        environments.python("base", [*PINS, *OURS])
        behind = environments.site_packages("base")
        python = environments.python(job, WANTED.get(job, [job]), behind)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return [{**row, "remark": f"not installed here: {error}"}]
    row["version"] = _version(python, name)
    path = os.pathsep.join(map(str, (ROOT / "triton_kernels", ROOT)))
    with tempfile.TemporaryDirectory() as working:
        ran = subprocess.run(
            [str(python), str(JOBS / f"with_{job}.py")],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            cwd=working, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    # A library may have put colours in front of our line.
    lines = [json.loads(line) for line in re.findall(r'\{"package".*', ran.stdout)]
    rows = [{**row, **{k: v for k, v in line.items() if k in FIELDS}} for line in lines]
    if ran.returncode:
        said = ran.stderr.strip().splitlines()[-1:]
        rows.append({**row, "remark": f"not run here: {' '.join(said)}"})
    return rows


def _version(python: Path, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def write(rows: list[dict[str, object]]) -> None:
    """Replace the rows of these packages in results.csv."""
    fresh = {row["package"] for row in rows}
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if r["package"] not in fresh] + rows
    rows.sort(key=lambda row: str(row["package"]).lower())  # stable: models in the job's order
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: " ".join(str(v).split())[:300] for k, v in row.items()})


def main() -> int:
    known = sorted(p.stem.removeprefix("with_") for p in JOBS.glob("with_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("jobs", nargs="*", help=f"any of {', '.join(known)}")
    parser.add_argument("--folder", type=Path, help="where the environments are made and kept")
    given = parser.parse_args()
    unknown = sorted(set(given.jobs) - set(known))
    if unknown:
        parser.error(f"expected jobs of {known}, got {unknown}")
    with tempfile.TemporaryDirectory() as temporary:
        environments = Environments(given.folder or Path(temporary))
        for job in given.jobs or known:
            begin = time.monotonic()
            rows = run(job, environments)
            write(rows)
            bad = [r for r in rows if any(_failed(r, s) for s in STAGES) or "train" not in r]
            seconds = time.monotonic() - begin
            print(f"{job}: {len(rows)} rows, {len(bad)} not whole, {seconds:.0f} s", flush=True)
    return 0


def _failed(row: dict[str, object], stage: str) -> bool:
    return "Error" in str(row.get(stage, "")) or row.get(stage) == "not reached"


if __name__ == "__main__":
    sys.exit(main())
