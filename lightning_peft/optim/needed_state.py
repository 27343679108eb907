"""Which tensors an optimizer class keeps per parameter: found by one step of a new one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.optim.optimizers import PooledOptimizer

__all__ = ["needed_names"]


def needed_names(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> set[str] | None:
    """Return the names of the tensors that a step of this class keeps; None if it cannot be tried.

    A new optimizer of the class steps once over one small parameter, with the options of the file.
    """
    if isinstance(optimizer, PooledOptimizer):
        return None
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    options = {**optimizer.param_groups[0], **groups[0]} if groups else {}
    options |= {"params": [weight], "fused": None, "foreach": None, "capturable": False}
    options.pop("param_names", None)
    try:
        accepted = inspect.signature(type(optimizer)).parameters
        given = {k: v for k, v in options.items() if k in accepted}
        trial = type(optimizer)(**given)
        trial.step()
    except Exception:  # a class of the user's, with arguments of its own
        return None
    return {k for k, v in trial.state[weight].items() if isinstance(v, Tensor)}
