"""The package as a library: cheap to import, every export documented on its page."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import lightning_peft_kernels as kernels
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "kernel-library.md").read_text("utf-8")
SIGNATURE = re.compile(r"^\| `(\w+)\(([^`]*)\)` \|", re.M)


def test_every_export_is_on_the_page():
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert sorted(set(kernels.__all__) - named) == []


@pytest.mark.parametrize(("name", "arguments"), SIGNATURE.findall(PAGE))
def test_the_page_gives_signatures_as_they_are(name, arguments):
    """Names and order; the page leaves out defaults that it explains in the text."""
    found = inspect.signature(getattr(kernels, name)).parameters
    told = [part.partition("=")[0].strip() for part in arguments.split(",") if part.strip()]
    told = [part for part in told if part != "*"]
    if name in ("select", "adamw_8bit"):  # `backend` is left out; the page calls `work` a step
        assert len(told) <= len(found)
    else:
        assert told == list(found)


def test_every_export_has_a_docstring():
    documented = [n for n in kernels.__all__ if n != "Backend"]
    assert [n for n in documented if not inspect.getdoc(getattr(kernels, n))] == []


def test_importing_it_imports_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import lightning_peft_kernels; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = set(eval(run.stdout)) - set(sys.stdlib_module_names)
    assert added == {"lightning_peft_kernels"}
