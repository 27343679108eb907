"""Merging into an fp64 base keeps the precision of its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft import methods
from lightning_peft.methods.base import Method
from tests.helpers.compare import relative_error

METHODS: list[Method] = [
    lp.LoRA(r=2, target_modules=["0", "2"]),
    lp.DoRA(r=2, target_modules=["0", "2"]),
    methods.HRA(r=2, target_modules=["0", "2"]),
    methods.RoAd(group_size=4, target_modules=["0", "2"]),
    methods.GLoRA(r=2, target_modules=["0", "2"]),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
@pytest.mark.parametrize(("wide", "bound"), [(True, 1e-12), (False, 1e-6)])
def test_merge_equals_forward(method: Method, wide: bool, bound: float) -> None:
    """With an adapter in fp64, and with one in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lp.attach(model, method)
    model = model.double() if wide else model
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    x = torch.randn(5, 16, dtype=torch.float64)
    want = model(x).detach()
    lp.merge(model)
    assert model[0].weight.dtype == torch.float64
    assert relative_error(model(x), want) < bound
    lp.unmerge(model)
    lp.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
