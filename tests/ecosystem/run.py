"""Fine-tunes inside packages of others: one fresh environment per package, from PyPI.

    python tests/ecosystem/run.py                 # all
    python tests/ecosystem/run.py darts lightly

Each environment gets the package, the tested torch and what lightning_peft itself needs. Each job
trains LoRA over NF4 through the package's own entry point, saves, resumes in a fresh module and
predicts. The last line of a job is JSON; the table of all is in docs/any-loop.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "ecosystem" / "jobs"
#: What to install beside the package itself.
MORE = {
    "darts": ["darts[torch]", "pytorch-lightning"],
    "lightly": ["pytorch-lightning", "torchvision"],
    "pytorch_tabular": ["requests"],
}
OURS = ["rich", "safetensors", "typing-extensions"]
MINUTES = 10


def torch_pin() -> str:
    found = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert found is not None
    return found[0]


def run(package: str, folder: Path) -> dict[str, object]:
    """Make the environment, run the job, return its line with the versions and the seconds."""
    environment = folder / package
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    wanted = [package, torch_pin(), *MORE.get(package, ()), *OURS]
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    subprocess.run([str(c) for c in install], check=True, timeout=60 * MINUTES)
    path = os.pathsep.join(map(str, (ROOT / "triton_kernels", ROOT)))
    begin = time.monotonic()
    ran = subprocess.run(
        [str(python), str(JOBS / f"with_{package}.py")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
        cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES, check=False,
    )  # fmt: skip
    if ran.returncode:
        return {"package": package, "failed": ran.stderr.strip().splitlines()[-1:]}
    lines = [line for line in ran.stdout.splitlines() if line.startswith('{"package"')]
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    versions = {d["name"]: d["version"] for d in json.loads(listed.stdout)}
    kept = {n: v for n, v in versions.items() if "lightning" in n.lower() or n == package}
    return {**json.loads(lines[-1]), "versions": kept, "seconds": round(time.monotonic() - begin)}


def main() -> int:
    names = sys.argv[1:] or sorted(p.stem.removeprefix("with_") for p in JOBS.glob("with_*.py"))
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            answer = run(name, Path(folder))
            failed = failed or "failed" in answer
            print(json.dumps(answer), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
