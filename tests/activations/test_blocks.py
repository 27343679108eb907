"""Which modules are blocks, and which tensors leave."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import Activations, LoRA, attach, limit_activations
from lightning_peft.activations.blocks import find_blocks
from lightning_peft.activations.host_memory import (
    HostCopy,
    HostGroup,
    HostMemories,
    SynchronousHost,
)
from lightning_peft.activations.limit import ActivationLimit
from tests.helpers.tiny_models import BUILDERS


def names(model: nn.Module, *chosen: str) -> list[str]:
    return [name for name, _ in find_blocks(model, list(chosen) or None)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("t5", [f"{s}.block.{i}" for s in ("encoder", "decoder") for i in (0, 1)]),
        ("clip", [f"{s}_model.encoder.layers.{i}" for s in ("text", "vision") for i in (0, 1)]),
    ],
)
def test_blocks_of_transformers(model: str, expected: list[str]) -> None:
    assert names(BUILDERS[model]()) == expected


def test_named_blocks() -> None:
    llama = BUILDERS["llama"]()
    attach(llama, LoRA(r=2))
    assert names(llama, "LlamaMLP") == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert names(llama, "layers.1", "LlamaMLP") == ["model.layers.0.mlp", "model.layers.1"]
    assert names(llama, "Linear")[0] == "model.layers.0.self_attn.q_proj"


class Routed(nn.Module):
    """Two equal blocks, each with a list of experts."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Module:
            inner = nn.Module()
            inner.gate = nn.Linear(4, 2)
            inner.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
            return inner

        self.stem = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.blocks = nn.ModuleList([block(), block()])


def test_lists_of_equal_modules_but_no_experts() -> None:
    model = Routed()
    assert names(model) == ["blocks.0", "blocks.1"]
    with pytest.raises(ValueError, match="found none"):
        find_blocks(model.blocks[0])


def moved(activations: Activations) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2)))
    model.requires_grad_(False)[0][0].bias.requires_grad_(True)
    with limit_activations(model, activations) as limit:
        model(torch.randn(16, 64)).sum().backward()
        return limit.moved


@pytest.mark.parametrize("kind", ["offload", "checkpoint+offload"])
def test_what_was_moved_is_free(kind: Any) -> None:
    """Outside of blocks, nothing holds the tensors that they saved."""
    saved = []

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).exp()  # saves its output
            saved.extend(weakref.ref(t.untyped_storage()) for t in (x, y))
            return y.sin()

    class Elsewhere(SynchronousHost):
        def put(self, tensor: torch.Tensor, group: HostGroup) -> HostCopy:
            return super().put(tensor.clone(), group)

    model = nn.Sequential(Keeping(), Keeping())
    memories = HostMemories(lambda device: Elsewhere())
    with ActivationLimit(model, Activations(kind, ["Keeping"], 0), memories):
        loss = model(torch.randn(4, 8)).sum()
        assert [ref() for ref in saved] == [None] * 4
        loss.backward()
    assert memories.moved > 0
    assert all(p.grad is not None for p in model.parameters())


def test_weights_and_small_tensors_stay() -> None:
    tensor = 16 * 64 * 4
    assert moved(Activations("checkpoint+offload", min_bytes=0)) == 2 * tensor
    # The outputs of both tanh; frozen linear layers save their weights, which stay.
    assert moved(Activations("offload", min_bytes=0)) == 2 * tensor
    assert moved(Activations("offload", min_bytes=tensor + 1)) == 0
