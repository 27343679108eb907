"""Forward of linear layers whose weight a storage holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.per_thread import exclusive

__all__ = ["plain_forward", "recomputed", "require_floating", "weight_in_place"]


@contextmanager
def weight_in_place(module: nn.Module, W: Tensor) -> Iterator[None]:
    """Within the block, the module's own forward finds W under ``weight``."""
    with exclusive(module):  # another thread would read this one's tensor
        vars(module)["weight"] = W
        try:
            yield
        finally:
            vars(module).pop("weight", None)


def recomputed(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`product(x)`, run again in backward, so that no dequantised weight is kept."""
    if not torch.is_grad_enabled():
        return product(x)
    y: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
    return y


def plain_forward(module: nn.Module) -> bool:
    """Whether a kernel may replace the forward: that of `nn.Linear` or of GPT-2's Conv1D."""
    cls = base_class(module)
    return cls.forward is nn.Linear.forward or cls.__name__ == "Conv1D"


def require_floating(module: nn.Module, x: Tensor) -> None:
    """Raise if the model cast its activations to the dtype of the packed bytes.

    Raises:
        TypeError: `x` is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"{type(module).__name__} with a quantised weight: expected a floating input, got "
            f"{x.dtype}; the model casts activations to the weight's dtype: keep this layer dense "
            "with Quantization(exclude_modules=[…])"
        )
