"""What one training step of an adapted layer calls, on a chip that is not here."""

from __future__ import annotations

import torch
from torch import nn

import lightning_peft as lp
from tests.helpers.decoding_calls import WAITS
from tests.helpers.fake_gpu import use_fake_gpu
from tests.helpers.traffic import Traffic

__all__ = ["run_step"]


def run_step(chip: str, dropout: float) -> None:
    """Print torch's ops, our launches and the bytes of the ops of one step; nothing waits."""
    model = nn.Sequential(nn.Linear(256, 512, bias=False)).to(torch.bfloat16)
    every = lp.LoRA(r=8, alpha=16, dropout=dropout, target_modules="all-linear")
    lp.attach(model, every, quantization=lp.Quantization())
    model.to(torch.bfloat16).train()
    x = torch.randn(2048, 256).to(torch.bfloat16).requires_grad_()
    dY = torch.randn(2048, 512).to(torch.bfloat16)
    driver = use_fake_gpu(chip)

    def step() -> None:
        model(x).backward(dY)
        for t in (x, *model.parameters()):
            t.grad = None

    step()  # compiles, fills the caches of tables
    driver.launched.clear()
    with Traffic() as seen:
        step()
    waits = {name.partition(".")[2] for name in WAITS}
    assert not waits & set(seen.calls), seen.calls
    print(sum(seen.calls.values()), len(driver.launched), seen.bytes, flush=True)
