"""Prose keeps to docs/style-prose.md: phrases that read as if translated do not come back."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "lightning_peft", ROOT / "triton_kernels" / "lightning_peft_kernels")
GUIDE = ROOT / "docs" / "style-prose.md"  # quotes what it bans
SOURCES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p != GUIDE),
    *sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")),
]

#: Phrase → what to write instead.
BANNED = {
    r"\ba layer at a time\b": "layer by layer",
    r"\botherwise than\b": "differently from",
    r"\bnobody\b": "name who does not",
    r"\banew\b": "again, or a verb with re-",
    r"\b(adapted|cut|matter|sharded|treated) alike\b": "equal, in the same way",
    r"\b(was|is|are|were) asked for\b": "requested, given, needed",
    r"\bdoes too\.$": "repeat the verb",
    r"\bsuch as are\b": "that are",
    r"\b(rows|tokens) an expert\b": "per expert",
    r"\bbytes an element\b": "per element",
    r"\bgot 1 differences\b": "a plural that fits",
    # "one per layer", not "one a layer"
    r"\b([Ll]ines?|[Pp]ieces?|[Ss]amples|[Tt]okens|[Bb]ytes|[Bb]its|[Rr]ows|[Ff]iles?|[Oo]ne|[Nn]umbers?"
    r"|[Mm]illiseconds|[Ss]econds|[Tt]wo|[Ff]our) an? (layer|process|rank|sample|expert|element"
    r"|method|token|step|weight|row|block|head|seed|unit|chip)\b": "per",
    r"\bsaid at the start\b": "the error at the start says",
    r"\b[Pp]ackages of others\b": "third-party packages",
    r"\bif that is not meant\b": "say what to do",
    r"\bwhere such\b": "if",
    r"\btold by (its|their) names?\b": "recognised by name",
}


@cache
def text_of(path: Path) -> str:
    return path.read_text("utf-8")


@cache
def docstrings(path: Path) -> list[tuple[int, str]]:
    """Line and text of every docstring of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, kinds)]
    texts = [(getattr(node, "lineno", 1), ast.get_docstring(node)) for node in nodes]
    return [(line, text) for line, text in texts if text is not None]


@pytest.mark.parametrize("phrase", BANNED)
def test_no_banned_phrase(phrase: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*SOURCES, *PAGES)
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if re.search(phrase, line)
    ]
    assert not found, f"write: {BANNED[phrase]}"


def test_docstrings_begin_with_a_subject_or_a_verb() -> None:
    """A summary stands alone, on one line, and names its object."""
    bad = []
    for path in SOURCES:
        for line, text in docstrings(path):
            summary = text.splitlines()[0]
            if summary.startswith("The same") or summary.endswith(":") or len(summary) > 100:
                bad.append(f"{path.relative_to(ROOT)}:{line}: {summary}")
    assert not bad


def test_symbols_are_not_capitalised() -> None:
    """A formatter once turned `y + other` into "Y + other" at the start of a docstring."""
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in SOURCES
        for line, text in docstrings(path)
        if re.match(r"(Vec identity|S at this|Y \+ other)", text)
    ]
    assert not bad


def test_entries_of_arguments_begin_with_a_noun() -> None:
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {entry.strip()}"
        for path in SOURCES
        for line, text in docstrings(path)
        for entry in text.splitlines()
        if re.match(r"\s*[\w, *]+: Of ", entry)
    ]
    assert not bad
