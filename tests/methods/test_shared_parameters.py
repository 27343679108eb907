"""Trained tensors that sites share: held once, started by the seed, saved, reset."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.methods import TinyLoRA, UniLoRA, VBLoRA
from lightning_peft.strategies.sharding import _check_adapters
from tests.helpers.compare import assert_same_bits

METHODS = {
    "bank": (VBLoRA(r=2, num_vectors=6, vector_length=4, target_modules=["0", "2"]), 24),
    "theta": (UniLoRA(r=2, length=32, target_modules=["0", "2"]), 32),
    "v": (TinyLoRA(r=2, u=3, weight_tying=1.0, init="uniform", target_modules=["0", "2"]), 3),
}


def adapted(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    lp.attach(model, METHODS[name][0])
    return model


def adapters(model: nn.Module) -> list:
    return [a for _, m in adapted_modules(model) for a in adapters_of(m)]


@pytest.mark.parametrize("name", METHODS)
def test_one_tensor(name: str) -> None:
    model = adapted(name)
    tensors = [a.tensors()[name] for a in adapters(model)]
    assert len(tensors) == 2
    assert tensors[0] is tensors[1]
    shared = [p for n, p in model.named_parameters() if n.endswith(f"shared_tensors.{name}")]
    assert len(shared) == 1
    assert shared[0].requires_grad
    assert shared[0].numel() == METHODS[name][1]
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    model(torch.randn(3, 16)).pow(2).sum().backward()
    both = shared[0].grad.clone()
    assert both.any()
    twin = copy.deepcopy(model)
    found = [a.tensors()[name] for a in adapters(twin)]
    assert found[0] is found[1]
    assert found[0] is not tensors[0]
    lp.detach(model)
    assert not [n for n, _ in model.named_parameters() if "peft" in n]


@pytest.mark.parametrize("name", METHODS)
def test_state_and_reset(name: str) -> None:
    model = adapted(name)
    start = copy.deepcopy(lp.adapter_state_dict(model))
    assert sum(k.endswith(f".{name}") for k in start) == 1
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    saved = copy.deepcopy(lp.adapter_state_dict(model))
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))  # as `adapted` draws
    lp.reset_adapters(model, seed=torch.initial_seed())
    for key, value in lp.adapter_state_dict(model).items():
        assert_same_bits(key, value, start[key])
    lp.load_adapter_state_dict(model, saved)
    for key, value in lp.adapter_state_dict(model).items():
        assert_same_bits(key, value, saved[key])


def test_reset_of_what_starts_from_the_weight() -> None:
    """DoRA's magnitude is the norm of the weight again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    lp.attach(model, lp.DoRA(r=2, target_modules=["0"]))
    start = copy.deepcopy(lp.adapter_state_dict(model))
    nn.init.normal_(adapters(model)[0].magnitude)
    lp.reset_adapters(model)
    assert_same_bits("magnitude", adapters(model)[0].magnitude, start["0.peft.default.magnitude"])


@pytest.mark.parametrize("name", METHODS)
def test_fsdp_refuses_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"with shared \['{name}'\]; use strategy='peft_ddp'"):
        _check_adapters(adapted(name))
