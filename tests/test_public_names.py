"""Public names: imported when they are first named, found by every reader."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lightning_peft
from lightning_peft.extend import WeightMethod, register_method
from lightning_peft.methods.registry import METHODS
from tests.test_import_cost import printed

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
    for name in ("methods.lora", "a.b"):
        assert not hasattr(lightning_peft, name)


def test_methods_are_found_by_their_names_and_their_files() -> None:
    assert {"DoRA", "LoRA", "mam"} <= set(dir(lightning_peft.methods))
    assert lightning_peft.methods.adalora.AdaLoRA is lightning_peft.AdaLoRA
    assert sorted(METHODS) == list(METHODS)


TAKEN = """
import json
from dataclasses import dataclass
from lightning_peft.extend import WeightMethod, register_method
@dataclass(frozen=True)
class DoRA(WeightMethod):
    pass
try:
    register_method(DoRA)
    answer = "registered"
except ValueError as error:
    answer = str(error)
print(json.dumps([answer]))
"""


def test_a_name_that_is_taken_is_refused_before_its_file_is_imported() -> None:
    (answer,) = printed(TAKEN)
    assert answer == (
        "register_method: expected a name of its own, got DoRA of __main__, which "
        "lightning_peft.methods.dora has; checkpoints name a method by its class, so give yours "
        "another name"
    )


def test_a_module_that_is_run_again_registers_again() -> None:
    for _ in range(2):

        @register_method
        @dataclass(frozen=True)
        class TwiceRegistered(WeightMethod):
            pass

    try:
        assert METHODS["TwiceRegistered"] is TwiceRegistered
    finally:
        del METHODS["TwiceRegistered"]


def test_a_saved_program_loads_after_the_bare_import(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(64, 64))
    lightning_peft.attach(
        net, lightning_peft.LoRA(r=2, target_modules="all-linear"), quantization="nf4"
    )
    x = torch.ones(2, 64)
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(net.eval(), (x,)), path)
    code = f"""
import json
import lightning_peft, torch
program = torch.export.load({str(path)!r})
print(json.dumps(program.module()(torch.ones(2, 64)).tolist()))
"""
    torch.testing.assert_close(torch.tensor(printed(code)), net(x))
