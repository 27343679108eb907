"""Layers whose forward is one product with their weight, and nothing else."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class

__all__ = ["plain_forward", "require_floating"]


def plain_forward(module: nn.Module) -> bool:
    """Whether a kernel may stand for the layer: `nn.Linear`'s own forward, or GPT-2's Conv1D."""
    cls = base_class(module)
    return cls.forward is nn.Linear.forward or cls.__name__ == "Conv1D"


def require_floating(module: nn.Module, x: Tensor) -> None:
    """Raise where a model cast its activations to the dtype of packed bytes.

    Raises:
        TypeError: x is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"{type(module).__name__} with 4-bit weight: expected a floating input, got {x.dtype}; "
            "the model casts activations to the weight's dtype: keep this layer dense with "
            "Quantization(exclude_modules=[…])"
        )
