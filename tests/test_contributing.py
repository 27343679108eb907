"""The recipes of CONTRIBUTING.md, followed to the letter."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft import LoRA, extend
from lightning_peft.layers import ops_for
from lightning_peft.methods.registry import METHODS
from tests.helpers.compare import assert_close
from tests.helpers.layer_cases import LAYERS
from tests.helpers.method_cases import Case
from tests.test_invariants import test_adapter as check_adapter

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def recipe(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The module that the section's code block becomes."""
    block = re.search(r"```python\n(.*?)```", section(request.param), re.DOTALL)
    assert block is not None
    name = "recipe_of_contributing"
    path = tmp_path / f"{name}.py"
    path.write_text("\n".join(line.removeprefix("   ") for line in block[1].splitlines()) + "\n")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    METHODS.pop("MyMethod", None)
    del sys.modules[name]


@pytest.mark.parametrize("recipe", ["Add a method"], indirect=True)
def test_a_method(recipe: ModuleType) -> None:
    line = re.search(r'`(Case\("my_method".*?\))` to', section("Add a method"))
    assert line is not None
    case = eval(line[1], {"Case": Case, "MyMethod": recipe.MyMethod})
    for layer in LAYERS:
        if layer.name in ("linear", "conv2d", "embedding", "nf4", "gru"):
            check_adapter(case, layer)


@pytest.mark.parametrize("recipe", ["Add a layer kind"], indirect=True)
def test_a_layer_kind(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(recipe.MyLinear(6, 5))
    x = torch.randn(3, 6)
    kernel = model[0].kernel.detach().clone()
    lp.attach(model, LoRA(r=2, target_modules="all-linear"))
    p = model[0].peft.default
    nn.init.normal_(p.B)
    expected = x.double() @ (kernel.double() + (p.B @ p.A).mT.double() * 4.0)
    assert_close("forward", model(x).double(), expected, floor=1e-5)
    lp.merge(model)
    assert_close("forward after merge", model(x).double(), expected, floor=1e-5)
    assert isinstance(ops_for(recipe.MyLinear(2, 2)), recipe.MyLinearOps)


@pytest.mark.parametrize("recipe", ["Add a storage"], indirect=True)
def test_a_storage(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    W, x = model[0].weight.detach().clone(), torch.randn(4, 64)
    report = lp.attach(model, LoRA(r=2, target_modules=["0", "2"]), quantization=recipe.MyConfig())
    assert "my int8" in str(report)
    scale = W.abs().amax(1, keepdim=True) / 127
    rounded = (W / scale).round() * scale
    expected = torch.nn.functional.linear(x, rounded, model[0].bias)
    assert_close("first layer", model[0](x), expected, floor=1e-5)
    model(x).sum().backward()
    assert model[0].peft.default.B.grad is not None


@pytest.mark.parametrize("recipe", ["Add a kernel"], indirect=True)
def test_a_kernel(recipe: ModuleType) -> None:
    u = torch.randn(4, 8, dtype=torch.bfloat16)
    assert torch.equal(recipe.my_scale(u, 0.5), (u.double() * 0.5).to(torch.bfloat16))
    compiled = torch.compile(recipe.my_scale, backend="eager", fullgraph=True)
    assert torch.equal(compiled(u, 0.5), recipe.my_scale(u, 0.5))


def test_extend_exports_what_it_lists() -> None:
    assert sorted(extend.__all__) == list(extend.__all__)
    for name in extend.__all__:
        assert getattr(extend, name).__doc__, name
