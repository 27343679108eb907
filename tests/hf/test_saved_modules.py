"""``modules_to_save`` next to other options of peft: biases, attention, modules inside modules."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import by_peft, in_peft, loaded


class Net(nn.Module):
    """A layer, attention with biases of its own, a head in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre(x)
        y: Tensor = self.head(h + self.attention(h, h, h, need_weights=False)[0])
        return y


def net() -> Net:
    torch.manual_seed(0)
    built = Net().eval()
    with torch.no_grad():
        for name, p in built.named_parameters():
            if "bias" in name:
                p.normal_(std=0.3)
    return built


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
CASES: dict[str, dict[str, Any]] = {
    "every bias": {"bias": "all", "target_modules": ["pre"]},
    "every bias and a head": {
        "bias": "all", "target_modules": ["pre"], "modules_to_save": ["head"],
    },
    "every bias and a layer": {
        "bias": "all", "target_modules": ["pre"], "modules_to_save": ["head.2"],
    },
    "biases of attention": {"bias": "lora_only", "target_modules": ["pre", "attention"]},
    "every bias, attention": {"bias": "all", "target_modules": ["attention"]},
    "a part of an attention": {
        "target_modules": ["pre"], "modules_to_save": ["attention.out_proj"],
    },
    "a part of an adapted layer": {
        "target_modules": ["attention"], "modules_to_save": ["attention.out_proj", "head.0"],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_from_peft_and_back(case: str, tmp_path: Path) -> None:
    base = net()
    theirs = by_peft(base, tmp_path / "theirs", r=2, **CASES[case])
    model = loaded(base, tmp_path / "theirs")
    assert_close("peft here", model(X), theirs(X), floor=1e-5)
    lp.save_adapter(model, tmp_path / "ours")
    assert_close("ours in peft", in_peft(base, tmp_path / "ours")(X), theirs(X), floor=1e-5)
    lp.merge(model)
    assert_close("merged", model(X), theirs(X), floor=1e-5)


@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.MiSS(r=2)], ids=["LoRA", "MiSS"])
def test_a_trained_part_of_an_adapted_layer_is_refused(method: Any) -> None:
    """One layer reads both; none of them may take the other's place."""
    model = net()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    wanted = dataclasses.replace(method, target_modules=["attention", "pre"])
    with pytest.raises(ValueError, match=r"'attention', which reads 'attention\.out_proj' itself"):
        lp.attach(model, wanted, modules_to_save=["attention.out_proj"])
    assert model.state_dict().keys() == before.keys()
    lp.attach(model, wanted, modules_to_save=["attention", "head"])  # trained whole instead


def test_biases_that_contradict_the_copy(tmp_path: Path) -> None:
    by_peft(net(), tmp_path, r=2, **CASES["every bias and a layer"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.head.2.modules_to_save.bias"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"extra base_model.model.head.2.modules_to_save.bias"):
        lp.load_adapter(net(), tmp_path)


@pytest.mark.parametrize("saved", [["head", "head.0"], ["head.0", "head"]])
def test_trained_modules_inside_of_each_other(saved: list[str], tmp_path: Path) -> None:
    """peft wraps the inner one again, writes one of both, and cannot read its own file."""
    base = net()
    config = peft.LoraConfig(r=2, target_modules=["pre"], modules_to_save=saved)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
    with pytest.raises(KeyError):
        in_peft(base, tmp_path)
    with pytest.raises(ValueError, match="not inside of each other"):
        lp.load_adapter(base, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_of_a_rank_above_the_layers(start: str, tmp_path: Path) -> None:
    """They have as many vectors as the layer; the scale is that of the configured rank."""
    base = net()
    theirs = by_peft(
        base, tmp_path, r=6, lora_alpha=9, init_lora_weights=start,
        target_modules=["pre", "head.0", "head.2"],
    )  # fmt: skip
    model = loaded(base, tmp_path)
    assert_close("peft here", model(X), theirs(X), floor=1e-5)
    lp.save_adapter(model, tmp_path / "ours")
    assert_close("ours in peft", in_peft(base, tmp_path / "ours")(X), theirs(X), floor=1e-5)
