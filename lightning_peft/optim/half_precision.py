"""Refuses fp16 parameters under an optimizer whose epsilon rounds to zero."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from lightning_peft.optim.optimizers import PooledOptimizer

__all__ = ["check_half_precision"]


def check_half_precision(optimizer: Optimizer) -> None:
    """Raise if fp16 parameters are trained with an epsilon that is zero in fp16.

    LoRA's A has an exactly zero gradient in the first step, because B is zero. The step then
    computes 0/0, and A stays NaN. Pooled optimizers keep their state in fp32.

    Raises:
        ValueError: names the group and the alternatives.
    """
    if isinstance(optimizer, PooledOptimizer):
        return
    for i, group in enumerate(optimizer.param_groups):
        eps = group.get("eps")
        if not isinstance(eps, float) or not any(p.dtype == torch.float16 for p in group["params"]):
            continue
        if float(torch.tensor(eps, dtype=torch.float16)) == 0.0:
            raise ValueError(
                f"{type(optimizer).__name__}: expected an eps of at least 1e-7 for float16 "
                f"parameters, got eps={eps} in group {i}, which is zero in float16, so that the "
                "first step would make adapters NaN; use precision='16-mixed' or 'bf16-true', "
                "PEFT(optimizer='adamw_8bit'), whose state is float32, or eps=1e-4"
            )
