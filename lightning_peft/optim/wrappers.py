"""Optimizers inside the wrappers of training libraries."""

from __future__ import annotations

from torch.optim import Optimizer

__all__ = ["unwrap_optimizer"]


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside a wrapper of Lightning, Fabric or accelerate.

    All of them keep it under `optimizer`, which no optimizer of torch has.
    """
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer
