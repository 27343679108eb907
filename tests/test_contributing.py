"""The recipe of CONTRIBUTING.md, followed to the letter, adds a method that passes the suite."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from lightning_peft.methods.registry import METHODS
from tests.helpers.layer_cases import LAYERS
from tests.helpers.method_cases import Case
from tests.test_invariants import test_adapter as check_adapter

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def method(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    path = tmp_path / "my_method.py"
    path.write_text("\n".join(line.removeprefix("   ") for line in code.splitlines()) + "\n")
    spec = importlib.util.spec_from_file_location("my_method", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_method"] = module
    spec.loader.exec_module(module)
    yield module.MyMethod
    del METHODS["MyMethod"], sys.modules["my_method"]


def test_the_recipe(method) -> None:
    line = re.search(r'`(Case\("my_method".*?\))` to', TEXT).group(1)
    case = eval(line, {"Case": Case, "MyMethod": method})
    for layer in LAYERS:
        if layer.name in ("linear", "conv2d", "embedding", "nf4", "gru"):
            check_adapter(case, layer)
