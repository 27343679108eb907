"""LN_TUNING: trained normalisation layers to and from Hugging Face peft."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file, save_file
from torch import nn

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
    counted = trained(nn.Sequential(nn.BatchNorm1d(4)), lp.NormTuning())
    with pytest.raises(ValueError, match="running statistics"):
        lp.save_adapter(counted, tmp_path / "bn")
