"""The pages: every Python block runs from its page alone, in order, or says why it is not run.

A page starts with no names. A block may include a file (`# include docs/prelude.py`), as the site
does. A block followed by a `text` block raises that message. A block under a line that begins with
`MARK` is compiled, and the names it imports from our package must exist.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

import lightning_peft
from lightning_peft.__main__ import parser
from lightning_peft.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
MARK = "*Not run in the tests:"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)
INCLUDE = re.compile(r"^# include ([\w./-]+)$", re.M)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    marked: bool

    def compiled(self) -> Any:
        return compile("\n" * self.line + self.code, str(self.page), "exec")


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        line = text.count("\n", 0, match.start()) + 1
        code = INCLUDE.sub(lambda m: (ROOT / m[1]).read_text("utf-8"), textwrap.dedent(match[3]))
        found.append(Block(page, line, match[2], code, before.startswith(MARK)))
    return found


def plain(message: object) -> str:
    return " ".join(str(message).split())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    found = blocks(page)
    for block, following in zip_longest(found, found[1:]):
        if block.language != "python" or block.marked:
            continue
        if following is None or following.language != "text":
            exec(block.compiled(), names)
            continue
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the message is compared below
            exec(block.compiled(), names)
        assert plain(following.code) in plain(raised.value), f"{page.name}:{block.line}"


MARKED = [b for page in PAGES for b in blocks(page) if b.marked and b.language == "python"]


@pytest.mark.parametrize("block", MARKED, ids=lambda b: f"{b.page.stem}-{b.line}")
def test_marked_blocks_name_what_exists(block: Block) -> None:
    block.compiled()
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module == "lightning_peft":
            assert [a.name for a in node.names if not hasattr(lightning_peft, a.name)] == []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            ours = getattr(lightning_peft, node.func.id, None)
            if ours is None:
                continue
            parameters = inspect.signature(ours).parameters
            if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                continue
            assert [k.arg for k in node.keywords if k.arg not in parameters] == []


def commands() -> list[tuple[str, list[str]]]:
    """Every command of a shell block, and of a line of code in the page of examples."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                found += [
                    (page.stem, shlex.split(c, comments=True)) for c in block.code.splitlines()
                ]
        if page.stem == "examples":
            found += [
                (page.stem, c.split()) for c in re.findall(r"`(python [^`]+)`", page.read_text())
            ]
    return [(page, command) for page, command in found if command]


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda x: str(x)[:40])
def test_commands_exist(page: str, command: list[str]) -> None:
    if command[0] == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(command[1:]) <= set(targets)
    elif command[:3] == ["python", "-m", "lightning_peft"]:
        parser().parse_args(command[3:])
    elif command[0] == "lightning-peft":
        parser().parse_args(command[1:])
    elif command[0] == "python":
        assert (ROOT / command[1]).is_file()
    else:
        extras = ("lightning", "pytorch-lightning", "all,lightning", "all")
        assert command in [["pip", "install", f"lightning-peft[{extra}]"] for extra in extras]


def test_every_public_name_has_a_docstring() -> None:
    """They are the reference."""
    missing = [n for n in lightning_peft.__all__ if not inspect.getdoc(getattr(lightning_peft, n))]
    assert missing == []


def hook(name: str) -> Any:
    """Return a module of the docs folder."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_every_public_name_is_in_the_reference() -> None:
    reference = hook("reference")
    listed = {name for names in reference.GROUPS.values() for name in names}
    listed |= {cls.__name__ for cls in reference.methods()}
    listed |= set(re.findall(r"^::: [\w.]+\.(\w+)$", reference.entries("more"), re.M))
    assert set(lightning_peft.__all__) <= listed


def test_the_reference_shows_inherited_arguments_and_every_meaning() -> None:
    reference = hook("reference")
    for cls in reference.methods():
        entry = reference.method_entry(cls)
        assert f"## {cls.__name__}\n" in entry
        assert "| `target_modules` | `None` |" in entry
        rows = [row for row in rows_of(entry) if row.startswith("| `")]
        assert [row for row in rows if row.rstrip("| ").endswith("`")] == [], cls.__name__


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_tables_are_known(page: Path) -> None:
    tables, missing = hook("tables"), hook("table_format").MISSING
    made = tables.on_page_markdown(page.read_text("utf-8"))
    assert "<!-- table:" not in made
    for name in re.findall(r"<!-- table: (\w+) -->", page.read_text("utf-8")):
        text = tables.TABLES[name]()
        assert text == missing or len({r.count(" | ") for r in rows_of(text)[:3]}) == 1


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_every_method_is_a_public_name() -> None:
    parts_of_others = {"ModulesToSave", "TrainedBias"}
    methods = {n for n, cls in METHODS.items() if cls.__module__.startswith("lightning_peft.")}
    assert methods - parts_of_others <= set(lightning_peft.__all__)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = [tmp_path / "site" / name / "index.html" for name in ("api", "methods")]
    text = "".join(page.read_text("utf-8") for page in pages)
    headings = set(re.findall(r'<h[23] id="([^"]+)"', text))
    ends = {h.rpartition(".")[2].lower() for h in headings}
    assert [n for n in lightning_peft.__all__ if n.lower() not in ends] == []
    check = [sys.executable, "docs/check_site.py", str(tmp_path / "site"), "--links"]
    links = subprocess.run(
        check, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert links.returncode == 0, links.stdout
