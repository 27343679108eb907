"""Our imports bring in nothing heavy that lightning does not bring in by itself."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_peft

HEAVY = ("bitsandbytes", "transformers", "triton", "peft", "accelerate", "safetensors")

# In one interpreter: what lightning loads, what we load beyond it, and who imported what. Lightning
# itself brings transformers (through torchmetrics) and triton.
LOADED = """
import builtins, json, sys
import lightning.pytorch
before = sorted(sys.modules)
real, asked = builtins.__import__, set()
def spy(name, globals=None, *rest, **named):
    importer = (globals or {}).get("__name__", "")
    if importer.partition(".")[0] in ("lightning_peft", "lightning_peft_kernels"):
        asked.add((importer, name.partition(".")[0]))
    return real(name, globals, *rest, **named)
builtins.__import__ = spy
from lightning_peft import *
print(json.dumps([{"before": before, "after": sorted(sys.modules), "asked": sorted(asked)}]))
"""

# With compiled files in place, as in an installation; the first run of a machine makes them.
COST = """
import time, json
start = time.process_time()
import lightning.pytorch
middle = time.process_time()
from lightning_peft import PEFT, LoRA
print(json.dumps([(time.process_time() - middle) / (middle - start)]))
"""


def printed(code: str) -> list[object]:
    """What a fresh interpreter prints as JSON on its last line."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False, env=env,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answer: list[object] = json.loads(run.stdout.splitlines()[-1])
    return answer


def packages(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    (found,) = printed(LOADED)
    assert isinstance(found, dict)
    asked = found["asked"]
    assert ["lightning_peft", "lightning_peft"] in asked, "the spy saw none of our imports"
    return found


def test_nothing_beyond_lightning(loaded: dict[str, Any]) -> None:
    extra = packages(loaded["after"]) - packages(loaded["before"]) - sys.stdlib_module_names
    assert {name for name in extra if not name.startswith("_")} <= {
        "lightning_peft",
        "lightning_peft_kernels",
    }


@pytest.mark.parametrize("package", HEAVY)
def test_we_do_not_ask_for(package: str, loaded: dict[str, Any]) -> None:
    assert [importer for importer, imported in loaded["asked"] if imported == package] == []


# What a process has of ours after the bare import, and the methods it has after naming one.
LAZY = """
import json, sys
import lightning_peft
rooms = sorted({m.split(".")[1] for m in sys.modules if m.startswith("lightning_peft.")})
from lightning_peft import LoRA
methods = sorted(m for m in sys.modules if m.endswith((".lora", ".dora", ".adalora", ".oft")))
print(json.dumps([rooms, [m for m in methods if m.startswith("lightning_peft.methods.")]]))
"""


def test_a_name_imports_what_it_needs() -> None:
    rooms, methods = printed(LAZY)
    assert rooms == ["strategies", "trainers"]
    assert methods == ["lightning_peft.methods.formats.lora", "lightning_peft.methods.lora"]


def test_type_checkers_and_processes_find_the_same() -> None:
    """The imports that only type checkers read name the module that a process imports."""
    source = Path(str(lightning_peft.__file__)).read_text(encoding="utf-8")
    (block,) = (n for n in ast.parse(source).body if isinstance(n, ast.If) and not n.orelse
                and isinstance(n.test, ast.Name))  # fmt: skip
    read = {
        alias.name: str(statement.module)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert {*read, "register_strategies"} == set(lightning_peft.__all__)
    for name, module in read.items():
        found = getattr(lightning_peft, name)
        assert getattr(importlib.import_module(module), name) is found, name


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'LoRa'"):
        lightning_peft.LoRa  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'LoRa'"):
        lightning_peft.methods.LoRa  # noqa: B018


@pytest.mark.slow
def test_within_five_percent_of_lightning() -> None:
    """Processor time of one process, lightning first and then what we add; the median of three."""
    shares = sorted(float(str(printed(COST)[0])) for _ in range(3))
    assert shares[1] < 0.05
