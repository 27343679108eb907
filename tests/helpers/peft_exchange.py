"""What the exchange tests share: models, random adapters, and peft as the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.adapters.state_dict import trained_tensors
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

ARCHITECTURES = [
    *("llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "bloom", "falcon", "opt"),
    *("bert", "roberta", "modernbert", "distilbert", "t5", "flan_t5", "bart", "whisper"),
    *("vit", "convnext", "clip"),
]


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A base and a batch, the same at every call."""
    torch.manual_seed(7)
    return BUILDERS[name](), example_inputs(name)


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return main_output(model(**inputs))


def randomise(model: nn.Module, seed: int = 3, std: float = 0.2) -> None:
    """Trained tensors of ours, or peft's, away from their start: an adapter at its start proves
    nothing.
    """
    g = torch.Generator().manual_seed(seed)
    ours = trained_tensors(model)
    tensors = (
        [t for t in ours.values() if t.requires_grad]
        if ours
        else [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    )
    with torch.no_grad():
        for t in tensors:
            t.add_(torch.randn(t.shape, generator=g).to(t), alpha=std)


def trained(base: nn.Module, method: Any, **kwargs: Any) -> nn.Module:
    """A copy of the base with a random adapter of ours."""
    model = copy.deepcopy(base)
    lp.attach(model, method, **kwargs)
    randomise(model)
    return model.eval()


def in_peft(base: nn.Module, directory: Path, **kwargs: Any) -> nn.Module:
    loaded: nn.Module = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), str(directory), **kwargs
    )
    return loaded.eval()


def by_peft(
    base: nn.Module, directory: Path, kind: type[Any] = peft.LoraConfig, **config: Any
) -> nn.Module:
    """A random adapter made and saved by peft."""
    model = peft.get_peft_model(copy.deepcopy(base), kind(**config)).eval()
    randomise(model)
    model.save_pretrained(str(directory))
    return model


def loaded(base: nn.Module, directory: Path, **kwargs: Any) -> nn.Module:
    model = copy.deepcopy(base)
    lp.load_adapter(model, directory, **kwargs)
    return model
