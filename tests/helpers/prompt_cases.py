"""Prompt methods, models and steps that the tests of prompts and prefixes share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.methods import HardPrompt, PrefixTuning, PromptTuning, PTuning
from lightning_peft.methods.base import SequenceMethod
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

METHODS: dict[str, SequenceMethod] = {
    "prompt": PromptTuning(n=3),
    "random": PromptTuning(n=3, init="random"),
    "text": PromptTuning(n=5, init="text", init_ids=[7, 8, 9]),
    "add": PromptTuning(n=3, mode="add"),
    "hard": HardPrompt(n=3),
    "mlp": PTuning(n=3, hidden=16),
    "lstm": PTuning(n=3, encoder="lstm", hidden=8),
    "prefix": PrefixTuning(n=3),
    "projection": PrefixTuning(n=3, projection=True, hidden=8),
}
FEW = ["prompt", "add", "mlp", "prefix", "projection"]
QUICK = {"llama", "gpt_neox", "bert", "t5", "mamba", "vit", "clip", "whisper", "deepseek_v3"}
MODELS = ["llama", "gpt2", "gemma2", "opt", "bloom", "bert", "roberta", "t5", "bart"]
NO_PREFIX = {"mamba", "modernbert", "distilbert", "deepseek_v3"}


def some(names: list[str], *more: str) -> list[Any]:
    quick = QUICK | set(more)
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def built(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(3)
    return BUILDERS[name]().requires_grad_(False), example_inputs(name, **changes)


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    return main_output(model(**x))


def move(model: nn.Module, std: float = 0.2) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn_like(p))


def attached(name: str, method: SequenceMethod, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    model, x = built(name, **changes)
    lp.attach(model, method)
    move(model)
    return model, x


def prompt_of(name: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def alone_and_mixed(
    name: str, methods: dict[str, SequenceMethod], rows: list[str]
) -> tuple[Tensor, Tensor]:
    model, x = built(name, batch=len(rows))
    for adapter, method in methods.items():
        lp.attach(model, method, adapter_name=adapter)
        move(model)
    alone = []
    with torch.no_grad():
        for i, row in enumerate(rows):
            lp.set_adapter(model, None if row == "__base__" else row)
            alone.append(logits(model, x)[i])
        lp.set_adapter(model, list(methods))
        with lp.adapter_names(rows):
            mixed = logits(model, x)
    return torch.stack(alone), mixed


class Own(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, **masks: Any) -> Tensor:
        y: Tensor = self.layers(self.embed(ids), **masks)
        return y


def masks_for(kind: str) -> dict[str, Tensor | bool]:
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    return {
        "none": {},
        "causal": {"mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "both": {"mask": causal, "src_key_padding_mask": padding},
    }[kind]
