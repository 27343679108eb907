"""A step of QuantAwareLoRA on a chip that is not here, after it began to round."""

from __future__ import annotations

import json

import torch
from torch import nn

import lightning_peft as lp
from tests.helpers.created_tensors import CreatedTensors
from tests.helpers.fake_gpu import use_fake_gpu

__all__ = ["print_what_is_seen"]


def print_what_is_seen(chip: str) -> None:
    """Print the functions that made or read a tensor, and whether a kernel quantised, as JSON."""
    model = nn.Sequential(nn.Linear(64, 64))
    method = lp.QuantAwareLoRA(r=4, target_modules=["0"], start=0.0)
    lp.attach(model, method, quantization=lp.Quantization("nf4"))
    x = torch.randn(5, 64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    hooks = lp.MethodHooks(model, optimizer, total_steps=8)
    driver = use_fake_gpu(chip)

    def step() -> None:
        model(x).square().sum().backward()
        hooks.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    driver.launched.clear()
    with CreatedTensors() as seen:
        step()
    quantised = any("quantize_kernel" in one.kernel for one in driver.launched)
    found = {"made": sorted(seen.made), "read": sorted(seen.read), "quantised": quantised}
    print(json.dumps(found))
