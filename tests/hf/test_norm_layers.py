"""LN_TUNING: trained normalisation layers to and from Hugging Face peft."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, run, trained


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["input_layernorm", "norm"]), ("bert", ["LayerNorm"]), ("t5", ["layer_norm"])],
)
def test_both_ways(name: str, targets: list[str], tmp_path: Path) -> None:
    base, inputs = build(name)
    theirs = by_peft(base, tmp_path, peft.LNTuningConfig, target_modules=targets)
    model = loaded(base, tmp_path)
    assert_close("peft here", run(model, inputs), run(theirs, inputs), floor=1e-5)
    ours = trained(base, lp.NormTuning())
    lp.save_adapter(ours, tmp_path / "ours")
    want = run(ours, inputs)
    assert_close("ours in peft", run(in_peft(base, tmp_path / "ours"), inputs), want, floor=1e-5)
    again = loaded(base, tmp_path / "ours")
    assert_same_bits("ours again", run(again, inputs), want)
    lp.merge(again)
    assert_close("merged", run(again, inputs), want, floor=1e-5)


def test_refusals(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    by_peft(base, tmp_path, peft.LNTuningConfig, target_modules=["1"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("base_model.model.1.ln_tuning_layers.bias")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing 1\.bias"):
        lp.load_adapter(base, tmp_path)
    key = "base_model.model.0.ln_tuning_layers.bias"
    save_file({**tensors, key: bias}, file)
    with pytest.raises(ValueError, match=r"missing 0\.weight"):
        lp.load_adapter(base, tmp_path)


class Counted(nn.Module):
    """A normalisation with running statistics between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)))
        return y


def test_running_statistics(tmp_path: Path) -> None:
    """Training moves the copy's, here as in peft; without the adapter the base's act."""
    torch.manual_seed(0)
    base, x = Counted().eval(), torch.randn(8, 4)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LNTuningConfig(target_modules=["norm"])
    ).train()
    theirs(3 * x)
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    assert_close("peft here", loaded(base, tmp_path / "theirs")(x), theirs(x), floor=1e-6)
    ours = trained(base, lp.NormTuning())
    ours.train()(3 * x)
    want = ours.eval()(x)
    lp.save_adapter(ours, tmp_path / "ours")
    assert_close("ours in peft", in_peft(base, tmp_path / "ours")(x), want, floor=1e-6)
    again = loaded(base, tmp_path / "ours")
    assert_same_bits("ours again", again(x), want)
    lp.merge(again)
    assert_close("merged", again(x), want, floor=1e-6)
    with lp.disable_adapters(ours):
        assert_same_bits("the base", ours(x), base(x))
    lp.detach(ours)
    for key, tensor in base.state_dict().items():
        assert_same_bits(key, ours.state_dict()[key], tensor)
