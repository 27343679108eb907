"""Our imports bring in nothing heavy that lightning does not bring in by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

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


@pytest.mark.slow
def test_within_five_percent_of_lightning() -> None:
    """Processor time of one process, lightning first and then what we add; the median of three."""
    shares = sorted(float(str(printed(COST)[0])) for _ in range(3))
    assert shares[1] < 0.05
