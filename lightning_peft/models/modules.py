"""Hugging Face models and heads inside a model; eval mode and seeded draws inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_peft.core.modules import base_modules, modules_by_name
from lightning_peft.core.names import join

__all__ = [
    "evaluating",
    "fork_seeded_rng",
    "fresh_head_names",
    "head_names",
    "hf_models",
    "input_embeddings",
    "output_embeddings",
]

#: Attributes that hold an output layer for which `get_output_embeddings` may answer None.
_HEADS = frozenset(
    [
        "lm_head",
        "embed_out",
        "proj_out",
        "classifier",
        "score",
        "qa_outputs",
        "cls",
        "predictions",
        "generator_lm_head",
        "classification_head",
        "pre_classifier",
    ]
)
#: Heads that `from_pretrained` leaves fresh: a fine-tuning that does not train them learns nothing.
_FRESH_HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier")
_FRESH_TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForImageClassification",
    "ForAudioClassification",
    "ForMultipleChoice",
    "ForAudioFrameClassification",
    "ForSemanticSegmentation",
)


def hf_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of the outermost modules with a transformers config."""
    taken: list[str] = []
    for name, module in base_modules(model).items():
        if any(name.startswith(t + ".") or t == "" for t in taken):
            continue
        if isinstance(getattr(getattr(module, "config", None), "model_type", None), str):
            taken.append(name)
            yield name, module


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that the model's `get_input_embeddings` names, None if there is none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    # transformers offers no query: `get_input_embeddings` is on every model. It raises
    # NotImplementedError in a class without a single table, and AttributeError in one whose lookup
    # expects parts that this model was built without. Both mean that there is no such layer.
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that the model's `get_output_embeddings` names, None if there is none."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def head_names(model: nn.Module) -> set[str]:
    """Return the names of the output layers: output embeddings, and heads known by name."""
    heads: set[str] = set()
    names = {id(m): n for n, m in base_modules(model).items()}
    for name, module in hf_models(model):
        head = output_embeddings(module)
        if head is not None and id(head) in names:
            heads.add(names[id(head)])
        for child, part in module.named_children():
            if child in _HEADS:
                heads |= {join(name, child, n) for n in base_modules(part)}
    return heads


def fresh_head_names(model: nn.Module) -> list[str]:
    """Return the names of heads that `from_pretrained` initialises at random for a task."""
    return [
        join(name, child)
        for name, module in hf_models(model)
        if type(module).__name__.endswith(_FRESH_TASKS)
        for child, _ in module.named_children()
        if child in _FRESH_HEADS
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the block; each module gets its own mode back."""
    modes = [(m, m.training) for m in modules_by_name(model).values()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def fork_seeded_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw from a generator seeded with `seed` inside the block; outside, nothing was drawn.

    Args:
        seed: The seed.
        device: A CUDA device whose generator is seeded too.
    """
    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
