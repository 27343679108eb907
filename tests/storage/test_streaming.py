"""Quantising keeps one dense layer at a time, also where a start needs the dense weight."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.storage.nf4.storage import NF4Storage

WIDTH, LAYERS = 256, 6


@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
def test_no_more_than_two_dense_layers_live(init, monkeypatch) -> None:
    """Counted where each layer is about to be packed: originals and copies of the layers before."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[int] = []
    quantize, clone = NF4Storage.quantize, torch.Tensor.clone

    def tracked_clone(t: torch.Tensor, **kwargs) -> torch.Tensor:
        out = clone(t, **kwargs)
        if out.shape == (WIDTH, WIDTH):
            alive.append(weakref.ref(out))
        return out

    def counting_quantize(storage, module, *args):
        seen.append(sum(r() is not None for r in alive))
        quantize(storage, module, *args)

    monkeypatch.setattr(NF4Storage, "quantize", counting_quantize)
    monkeypatch.setattr(torch.Tensor, "clone", tracked_clone)
    lp.attach(
        model,
        lp.LoRA(r=4, init=init, target_modules=[str(i) for i in range(LAYERS)]),
        quantization=lp.Quantization("nf4"),
    )
    assert len(seen) == LAYERS
    assert max(seen) <= 2, seen
    assert all(m._parameters["weight"].dtype == torch.uint8 for m in model)
