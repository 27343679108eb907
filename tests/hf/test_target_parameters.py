"""`target_parameters` of peft on any module, from peft and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import by_peft, in_peft, randomise
from tests.helpers.peft_tables import TableCase, run_case


class Two(nn.Module):
    """Two matrices and a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.g = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a) @ self.b * self.g


class Stack(nn.Module):
    """Three matrices, summed."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 6))
        if is_transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        order = "bi,eio->bo" if hasattr(self, "is_transposed") else "bi,eoi->bo"
        return torch.einsum(order, x, self.w)


class Inside(nn.Module):
    """The part under test, and layers whose names end alike."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.part = m
        self.block = nn.ModuleDict({"m": nn.Linear(6, 6), "other": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        y = y[0] if isinstance(y, tuple) else y
        z: Tensor = self.block["other"](self.block["m"](y)) if y.shape[-1] == 6 else y
        return z


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x, x, x)[0]
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "two": (Two, {"target_parameters": ["part.a", "part.b"]}),
    "second": (Two, {"target_parameters": ["part.b"]}),
    "ranks": (
        Two,
        {
            "target_parameters": ["part.a", "part.b"],
            "rank_pattern": {"part.a": 1},
            "alpha_pattern": {"part.b": 3},
        },
    ),
    "beside a module": (Two, {"target_parameters": ["part.a"], "target_modules": ["other"]}),
    "stack": (lambda: Stack(False), {"target_parameters": ["part.w"]}),
    "transposed stack": (lambda: Stack(True), {"target_parameters": ["part.w"]}),
    "linear": (lambda: nn.Linear(6, 6), {"target_parameters": ["other.weight"]}),
    "square Conv1D": (lambda: Conv1D(6, 6), {"target_parameters": ["part.weight"]}),
    "Conv1D": (lambda: Conv1D(8, 6), {"target_parameters": ["part.weight"]}),
    "lstm": (
        lambda: nn.LSTM(6, 6),
        {"target_parameters": ["part.weight_ih_l0", "part.weight_hh_l0"]},
    ),
    "attention": (Attention, {"target_parameters": ["attn.in_proj_weight"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_from_peft_and_back(name: str) -> None:
    make, options = CASES[name]

    def build() -> nn.Module:
        torch.manual_seed(7)
        return Attention() if make is Attention else Inside(make())

    def inputs() -> dict[str, Tensor]:
        torch.manual_seed(2)
        return {"x": torch.randn(2, 5, 8) if make is Attention else torch.randn(4, 2, 6)[:, 0]}

    settings = {"r": 2, "lora_alpha": 5, "target_modules": [], "init_lora_weights": False}
    case = TableCase("", name, "", build, inputs, peft.LoraConfig, {**settings, **options})
    result = run_case(case)
    assert result.verdict == "pass", result


def test_embedding_as_a_matrix() -> None:
    settings = {"r": 2, "target_modules": [], "init_lora_weights": False}
    case = TableCase(
        *("", "embedding", ""),
        lambda: nn.Sequential(nn.Embedding.from_pretrained(torch.eye(7)[:, :5])),
        lambda: {"input": torch.arange(7)},
        peft.LoraConfig,
        {**settings, "target_parameters": ["0.weight"]},
    )
    assert run_case(case).verdict == "pass"


def test_named_with_its_module_only() -> None:
    model = Inside(Two())
    with pytest.raises(ValueError, match="matches none"):
        lp.attach(model, lp.LoRA(r=2, target_modules=["a"]))
    lp.attach(model, lp.LoRA(r=2, target_modules=["part.a"]))
    randomise(model)
    assert {n.partition(".peft.")[0] for n in lp.adapter_state_dict(model)} == {"part"}
    before, x = copy.deepcopy(model.part.a), torch.randn(4, 6)
    want = model(x)
    lp.merge(model)
    assert_close("merged", model(x), want, floor=1e-5)
    lp.unmerge(model)
    lp.detach(model)
    assert_same_bits("a", model.part.a, before)


def test_attention_of_other_versions(tmp_path: Path) -> None:
    """Up to 0.21 peft adds the output projection's change twice, later versions once."""
    torch.manual_seed(0)
    base, x = Attention().eval(), torch.randn(2, 5, 8)
    theirs = by_peft(base, tmp_path, r=2, target_modules=["attn"])
    again = copy.deepcopy(base)
    lp.load_adapter(again, tmp_path)
    assert_close("0.21", again(x), theirs(x), floor=1e-5)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "peft_version": "0.22.0"}))
    later = copy.deepcopy(base)
    report = lp.load_adapter(later, tmp_path)
    assert any("peft#3774" in note for note in report.notes)
    change = {k: v for k, v in lp.adapter_state_dict(later).items() if "out_proj" in k}
    twice = {k: v for k, v in lp.adapter_state_dict(again).items() if "out_proj" in k}
    (b,) = [k for k in change if k.endswith("B")]
    assert_close("B", 2 * change[b], twice[b], floor=1e-6)


def test_one_projection_of_an_attention(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    base, x = Attention().eval(), torch.randn(2, 5, 8)
    model = copy.deepcopy(base)
    lp.attach(model, lp.LoRA(r=2, target_modules=["attn.out_proj.weight"]))
    randomise(model)
    lp.save_adapter(model, tmp_path)
    recwarn.clear()
    theirs = in_peft(base, tmp_path)
    assert not [w for w in recwarn if "missing" in str(w.message)]
    assert_close("in peft", theirs(x), model.eval()(x), floor=1e-5)
