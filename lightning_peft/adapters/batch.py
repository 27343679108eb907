"""Where facts about a batch are found: the stack of a Hugging Face decoder, called with ids."""

from __future__ import annotations

from torch import nn

from lightning_peft.layers.adapted import adapted_modules, weight_adapters_of
from lightning_peft.layers.batch_facts import BatchObserver
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.models.modules import hf_models, input_embeddings

__all__ = ["observe_batch", "stack_of"]


def stack_of(model: nn.Module, method: Method) -> nn.Module:
    """The module between ids and hidden states of the one decoder in `model`.

    Raises:
        ValueError: no decoder, or several, or an encoder-decoder.
    """
    found = [m for _, m in hf_models(model)]
    if len(found) != 1 or getattr(getattr(found[0], "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{method.label}: expected one Hugging Face decoder in {type(model).__name__}, whose "
            f"input_ids say where it acts, got {[type(m).__name__ for m in found] or 'none'}; use "
            "LoRA, or attach to the model itself"
        )
    stack: nn.Module = found[0].base_model
    embedding = input_embeddings(stack)
    # OPT, BART and others call the decoder inside of their base model, with the ids.
    while isinstance(inner := getattr(stack, "decoder", None), nn.Module) and any(
        m is embedding for m in inner.modules()
    ):
        stack = inner
    return stack


def observe_batch(
    model: nn.Module, method: WeightMethod, stack: nn.Module, adapter_name: str
) -> None:
    """Let the adapters of a method see its facts about batches. The first one holds the hook."""
    observer = BatchObserver(method, stack)
    adapters = [a for _, m in adapted_modules(model) for a in weight_adapters_of(m, adapter_name)]
    adapters = [a for a in adapters if a.method is method]
    adapters[0].observer = observer
    for adapter in adapters:
        adapter.facts = observer.facts
