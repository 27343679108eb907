"""`Quantization(compute="fp8")` through attach: a short training ends where bf16 compute does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, Quantization, attach


def train(compute: str) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU())
    model.append(nn.Linear(128, 16))
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
    quantization = Quantization(compute=compute)  # type: ignore[arg-type]
    attach(model, LoRA(r=8, target_modules="all-linear"), quantization=quantization)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(100):
        x = torch.randn(64, 64)
        target = teacher(x).detach() + 0.3 * torch.randn(64, 16)  # data no model can predict
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_loss_ends_within_one_percent() -> None:
    plain, fp8 = train("auto"), train("fp8")
    assert fp8 != plain, "e4m3 products were not used"
    ends = [sum(losses[-30:]) / 30 for losses in (plain, fp8)]
    assert ends[0] < 0.7 * plain[0], "nothing was learnt"
    assert ends[1] == pytest.approx(ends[0], rel=0.01)


def test_ragged_layers_fall_back() -> None:
    model = nn.Sequential(nn.Linear(33, 20))
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization=Quantization(compute="fp8"))
    assert model(torch.randn(3, 33)).shape == (3, 20)
