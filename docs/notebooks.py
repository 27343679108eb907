"""Tutorials: runs a notebook without a kernel, and turns notebooks into pages of the site.

    python docs/notebooks.py docs/tutorials/serving.ipynb          # run it, print its output
    python docs/notebooks.py --keep docs/tutorials/serving.ipynb   # store the output too

Cells tagged ``install`` are for hosted notebooks and are skipped here. The rest is plain Python.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "tutorials"
OUTPUT_LINES = 60


# ---- running


def run(path: Path) -> list[list[dict[str, Any]]]:
    """Return the outputs of each cell, run in order in one namespace.

    Raises:
        RuntimeError: a cell raised; the message has its number, its source and the traceback.
    """
    os.environ.setdefault("MPLBACKEND", "agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, cell in enumerate(read(path)["cells"]):
        found.append(run_cell(cell, f"{path.name}, cell {number}", names) if runs(cell) else [])
    return found


def runs(cell: dict[str, Any]) -> bool:
    """Whether a cell is code that is run here."""
    return cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", ())


def run_cell(cell: dict[str, Any], name: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a cell prints, the value of its last expression, and its figures."""
    source = "".join(cell["source"])
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, name, "exec"), names)
            value = None
            if last is not None:
                value = eval(compile(ast.Expression(last.value), name, "eval"), names)  # type: ignore[attr-defined]
    except Exception as error:
        raise RuntimeError(f"{name}:\n{source}\n{traceback.format_exc()}") from error
    outputs = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    outputs += [display({"image/png": figure}) for figure in figures()]
    if value is not None and type(value).__module__.partition(".")[0] != "matplotlib":
        outputs.append(display({"text/plain": str(value).splitlines(keepends=True)}))
    return outputs


def display(data: dict[str, Any]) -> dict[str, Any]:
    """Return an output in the notebook format."""
    return {"output_type": "display_data", "metadata": {}, "data": data}


def figures() -> list[str]:
    """Return the open figures as base64 PNG, and close them."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    found = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=100, bbox_inches="tight")
        found.append(base64.b64encode(file.getvalue()).decode())
    pyplot.close("all")
    return found


def read(path: Path) -> dict[str, Any]:
    """Return the notebook as a dictionary."""
    notebook: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return notebook


def main() -> None:
    """Run a notebook in an empty folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--keep", action="store_true", help="store the outputs in the notebook")
    options = parser.parse_args()
    path = options.notebook.resolve()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            outputs = run(path)
        finally:
            os.chdir(here)
    for cell in outputs:
        for output in cell:
            print(text_of(output), end="")
    if options.keep:
        notebook, count = read(path), 0
        for cell, found in zip(notebook["cells"], outputs, strict=True):
            if runs(cell):
                count += 1
                cell["outputs"], cell["execution_count"] = found, count
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def text_of(output: dict[str, Any]) -> str:
    """Return the text of an output, or a line that stands for a figure."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    if "text/plain" in output["data"]:
        return "".join(output["data"]["text/plain"]) + "\n"
    return "<figure>\n"


# ---- the site


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page, and its figures, for every notebook."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.ipynb")):
        text, images = page(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, data in images.items():
            files.append(File.generated(config, f"tutorials/{name}", content=data))
    return files


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its figures by file name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in read(path)["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if len(parts) == 1:
                parts.append(f"[Download this notebook]({path.name}){{download}}")
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(images)}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure of this tutorial]({name})")
                continue
            lines = text_of(output).rstrip().splitlines()
            shown = "\n".join(lines[:OUTPUT_LINES]).replace("```", "'''")
            parts.append(f'<div class="output" markdown>\n\n```text\n{shown}\n```\n\n</div>')
    return "\n\n".join(parts) + "\n", images


if __name__ == "__main__":
    main()
