"""``bias`` of every type that has it: the base's biases, trained and exchanged with peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.beft import BEFT
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import by_peft, in_peft, loaded, trained

#: name → (our class and arguments, peft's class and arguments, the word for adapted layers)
TYPES: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any], str]] = {
    "LoRA": (lp.LoRA, {"r": 2}, peft.LoraConfig, {"r": 2}, "lora_only"),
    "AdaLoRA": (
        lp.AdaLoRA, {"init_r": 4, "target_r": 2},
        peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 10}, "lora_only",
    ),
    "VeRA": (lp.VeRA, {"r": 4}, peft.VeraConfig, {"r": 4}, "vera_only"),
    "OFT": (
        lp.OFT, {"block_size": 4}, peft.OFTConfig, {"oft_block_size": 4, "r": 0}, "oft_only",
    ),
    "BOFT": (lp.BOFT, {"block_size": 4}, peft.BOFTConfig, {"boft_block_size": 4}, "boft_only"),
    "MiSS": (lp.MiSS, {"r": 4}, peft.MissConfig, {"r": 4}, "MiSS_only"),
    "C3A": (lp.C3A, {"block_size": 4}, peft.C3AConfig, {"block_size": 4}, "c3a_only"),
    "DEFT": (lp.DEFT, {"r": 2}, peft.DeftConfig, {"r": 2}, "deft_only"),
    "DeLoRA": (lp.DeLoRA, {"r": 2}, peft.DeloraConfig, {"r": 2}, "delora_only"),
    "FourierFT": (
        lp.FourierFT, {"n_frequency": 9}, peft.FourierFTConfig, {"n_frequency": 9}, "fourier_only",
    ),
    "GraLoRA": (lp.GraLoRA, {"r": 2, "k": 2}, peft.GraloraConfig, {"r": 2, "gralora_k": 2},
                "gralora_only"),
    "HRA": (lp.HRA, {"r": 2}, peft.HRAConfig, {"r": 2}, "hra_only"),
    "PVeRA": (lp.PVeRA, {"r": 4}, peft.PveraConfig, {"r": 4}, "pvera_only"),
    "RandLoRA": (lp.RandLoRA, {"r": 3}, peft.RandLoraConfig, {"r": 3}, "randlora_only"),
    "TinyLoRA": (lp.TinyLoRA, {"r": 2}, peft.TinyLoraConfig, {"r": 2}, "tinylora_only"),
    "UniLoRA": (lp.UniLoRA, {"r": 2}, peft.UniLoraConfig, {"r": 2}, "unilora_only"),
    "VBLoRA": (
        lp.VBLoRA, {"r": 2, "num_vectors": 6, "vector_length": 2},
        peft.VBLoRAConfig, {"r": 2, "num_vectors": 6, "vector_length": 2}, "vblora_only",
    ),
    "WaveFT": (lp.WaveFT, {"n_frequency": 9}, peft.WaveFTConfig, {"n_frequency": 9}, "waveft_only"),
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.sweep(0.6)
@pytest.mark.parametrize("which", ["all", "adapted"])
@pytest.mark.parametrize("name", TYPES)
def test_both_ways(name: str, which: str, tmp_path: Path) -> None:
    ours, own, theirs, config, only = TYPES[name]
    bias, base = "all" if which == "all" else only, net()
    model = trained(base, ours(**own, bias=bias, target_modules=["0"]))
    moved = [n for n, p in model.named_parameters() if p.requires_grad and "bias" in n]
    assert len(moved) == (2 if which == "all" else 1)
    lp.save_adapter(model, tmp_path / "ours")
    assert_close("ours in peft", in_peft(base, tmp_path / "ours")(X), model(X), floor=1e-5)
    assert_same_bits("ours again", loaded(base, tmp_path / "ours")(X), model(X))
    other = by_peft(base, tmp_path / "peft", theirs, **config, bias=bias, target_modules=["0"])
    assert_close("peft here", loaded(base, tmp_path / "peft")(X), other(X), floor=1e-5)
    want = model(X)
    lp.merge(model)
    assert_close("merged", model(X), want, floor=1e-5)
    lp.unmerge(model)
    with lp.disable_adapters(model):
        assert_same_bits("disabled", model(X), base(X))


@pytest.mark.parametrize("name", TYPES)
def test_another_word(name: str) -> None:
    ours, own, *_ = TYPES[name]
    with pytest.raises(ValueError, match="expected bias in"):
        ours(**own, bias="some")
    lp.attach(copy.deepcopy(net()), ours(**own, target_modules=["0"]))


def test_beft_both_ways(tmp_path: Path) -> None:
    base = net()
    model = trained(base, BEFT(target_modules=["0", "2"]))
    lp.save_adapter(model, tmp_path / "ours")
    assert_close("ours in peft", in_peft(base, tmp_path / "ours")(X), model(X), floor=1e-5)
    assert_same_bits("ours again", loaded(base, tmp_path / "ours")(X), model(X))
    other = by_peft(base, tmp_path / "peft", peft.BeftConfig, target_modules=["0"])
    assert_close("peft here", loaded(base, tmp_path / "peft")(X), other(X), floor=1e-5)
    adds = trained(base, lp.IA3(mode="add", target_modules=["0"]))
    with pytest.raises(ValueError, match=r"attach BEFT\(\)"):
        lp.save_adapter(adds, tmp_path / "ia3")
