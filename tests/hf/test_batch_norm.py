"""BatchNorm in modules_to_save: running statistics belong to the trained copy."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import in_peft, loaded, randomise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.part = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(self.fc(x))
        return y


METHOD = lp.LoRA(r=2, target_modules=["fc"])
CONFIG = {"r": 2, "target_modules": ["fc"], "modules_to_save": ["part"]}


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1


def stepped(model: nn.Module, x: Tensor) -> nn.Module:
    randomise(model)
    model.train()
    model(x)
    return model.eval()


def test_of_peft(base: Net, x: Tensor, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG))
    stepped(theirs, x)
    theirs.save_pretrained(str(tmp_path))
    model = loaded(base, tmp_path)
    assert_close("logits", model(x), theirs(x), floor=1e-6)
    for each in (model, theirs):
        each.train()(x)
        each.eval()
    assert_close("after another step", model(x), theirs(x), floor=1e-6)
    assert int(model.part[0].peft["default"].num_batches_tracked) == 2


def test_of_ours(base: Net, x: Tensor, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    lp.attach(model, METHOD, modules_to_save=["part"])
    assert_same_bits("start", model(x), base(x))
    stepped(model, x)
    want = model(x)
    with lp.disable_adapters(model):
        assert_same_bits("disabled", model(x), base(x))
    lp.save_adapter(model, tmp_path)
    assert_close("peft", in_peft(base, tmp_path)(x), want, floor=1e-6)
    assert_same_bits("ours", loaded(base, tmp_path)(x), want)
    state = lp.adapter_state_dict(model)
    again = copy.deepcopy(base)
    lp.attach(again, METHOD, modules_to_save=["part"])
    lp.load_adapter_state_dict(again, state)
    assert_same_bits("state dict", again(x), want)
    lp.merge(model)
    assert_close("merged", model(x), want, floor=1e-6)
    lp.unmerge(model)
    assert_same_bits("unmerged", model(x), want)
    lp.detach(model)
    assert_same_bits("detached", model(x), base(x))


def test_two_adapters_have_their_own(base: Net, x: Tensor) -> None:
    model = copy.deepcopy(base)
    outputs = {}
    for name, scale in (("a", 1.0), ("b", 5.0)):
        lp.attach(model, METHOD, adapter_name=name, modules_to_save=["part"])
        model.train()
        model(scale * x)
        outputs[name] = model.eval()(x)
    for name, want in outputs.items():
        lp.set_adapter(model, name)
        assert_same_bits(name, model(x), want)
    lp.set_adapter(model, ["a", "b"])
    with lp.adapter_names(["a"] * 8 + ["b"] * 8):
        mixed = model(x)
    assert_close("rows of a", mixed[:8], outputs["a"][:8], floor=1e-6)
    assert_close("rows of b", mixed[8:], outputs["b"][8:], floor=1e-6)
