"""What a layer returns may be changed in place, as any layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp


@pytest.mark.parametrize("quantization", [None, lp.Quantization("nf4", block_size=32)])
@pytest.mark.parametrize("adapted", [False, True])
def test_output_in_place(quantization, adapted) -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    if quantization is not None:
        lp.quantize(model, quantization)
    if adapted:
        lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    x = torch.randn(2, 3, 32, requires_grad=True)
    y = model(x)
    y += 1.0
    y.sum().backward()
    assert x.grad is not None
