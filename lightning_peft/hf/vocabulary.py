"""Embeddings and output heads of a model, and files whose vocabulary has another size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["is_of_vocabulary", "resize_advice"]


def is_of_vocabulary(top: nn.Module, module: nn.Module) -> bool:
    """Whether the module is an embedding, or the output head of a Hugging Face model."""
    getter = getattr(top, "get_output_embeddings", None)
    return isinstance(module, nn.Embedding) or (callable(getter) and getter() is module)


def resize_advice(
    top: nn.Module, module: nn.Module, expected: Sequence[int], got: Sequence[int]
) -> str:
    """Return what to call if two shapes differ by the size of the vocabulary alone, else "".

    Args:
        top: The Hugging Face model.
        module: The embedding or head that a tensor of the file belongs to.
        expected: Shape by the model.
        got: Shape in the file.
    """
    weight = module._parameters.get("weight")
    if weight is None or len(expected) != len(got) or not is_of_vocabulary(top, module):
        return ""
    other = [(a, b) for a, b in zip(expected, got, strict=True) if a != b]
    if len(other) != 1 or other[0][0] != len(weight):
        return ""
    if not callable(getattr(top, "resize_token_embeddings", None)):
        return f"; give the model a vocabulary of {other[0][1]} before load_adapter"
    return f"; call model.resize_token_embeddings({other[0][1]}) before load_adapter"
