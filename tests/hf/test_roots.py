"""Roots that are compiled or lists, and blocks chosen by number and by the name of their list."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, by_peft, in_peft, randomise, run


class Chain(nn.ModuleList):
    """A model that is a list of blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Block(nn.Module):
    """A list inside of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parts[1](self.parts[0](x))
        return y


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_compiled_plain_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Nested(), torch.randn(3, 4)
    theirs = by_peft(base, tmp_path / "theirs", r=2, target_modules=["parts.0"])
    net = torch.compile(copy.deepcopy(base), backend="eager")
    lp.load_adapter(net, tmp_path / "theirs")
    assert_close("output", net(x), theirs(x), floor=1e-5)
    lp.save_adapter(net, tmp_path / "ours")
    assert_close("in peft", in_peft(base, tmp_path / "ours")(x), theirs(x), floor=1e-5)


def test_a_list_as_root(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Chain([Block(), Block()]), torch.randn(3, 4)
    theirs = by_peft(base, tmp_path / "theirs", r=2, target_modules=["1.parts.0"])
    model = copy.deepcopy(base)
    lp.load_adapter(model, tmp_path / "theirs")
    assert_close("output", model(x), theirs(x), floor=1e-5)
    model = copy.deepcopy(base)
    lp.attach(model, lp.LoRA(r=2, target_modules="all-linear", layers_to_transform=[1]))
    assert {n.partition(".")[0] for n in lp.adapter_state_dict(model)} == {"1"}
    randomise(model)
    lp.save_adapter(model, tmp_path / "ours")
    assert_close("in peft", in_peft(base, tmp_path / "ours")(x), model(x), floor=1e-5)


@pytest.mark.parametrize(("pattern", "n"), [(None, 4), ("blocks", 4), ("parts", 4), ("layers", 0)])
def test_the_list_that_numbers_count_in(pattern: str | None, n: int) -> None:
    method = lp.LoRA(
        r=2, target_modules="all-linear", layers_to_transform=[1], layers_pattern=pattern
    )
    model = Nested()
    if not n:
        with pytest.raises(ValueError, match="expected the name of a list of blocks"):
            lp.attach(model, method)
        return
    lp.attach(model, method)
    names = lp.adapter_state_dict(model)
    assert len(names) == n
    place = 1 if pattern != "parts" else 3
    assert {name.split(".")[place] for name in names} == {"1"}


def test_a_pattern_without_numbers() -> None:
    with pytest.raises(ValueError, match="expected with layers_to_transform"):
        lp.attach(Nested(), lp.LoRA(r=2, target_modules="all-linear", layers_pattern="blocks"))


@pytest.mark.parametrize("pattern", ["layers", "decoder.layers", ["encoder.layers"]])
def test_files_with_a_pattern(pattern: str | list[str], tmp_path: Path) -> None:
    base, inputs = build("bart")
    theirs = by_peft(
        base,
        tmp_path,
        r=2,
        target_modules=["q_proj"],
        layers_to_transform=[1],
        layers_pattern=pattern,
    )
    model = copy.deepcopy(base)
    lp.load_adapter(model, tmp_path)
    assert_close("logits", run(model, inputs), run(theirs, inputs), floor=1e-5)
