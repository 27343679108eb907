"""Fits factors so that a model's outputs approximate another model's on example inputs.

Each layer's best factors do not make the best model: errors add up along the layers, and do not
matter equally. A few passes over inputs without labels make up for much of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.models.modules import evaluating
from lightning_peft.models.outputs import main_output, output_of

__all__ = ["Goal", "fit_outputs", "goals_of"]

_PASSES = 4
_STEP = 2e-2  # of a tensor's root mean square: Adam's step for it, at the start; none at the end

Goal = tuple[Any, Tensor]  # a batch, and the output wanted on it


def goals_of(runner: nn.Module, inputs: Iterable[Any]) -> list[Goal]:
    """Batches, with the outputs of the model to approximate, on the CPU.

    Raises:
        ValueError: no batches, or an output that is not finite.
    """
    goals = [(batch, output_of(runner, batch).cpu()) for batch in inputs]
    if not goals:
        raise ValueError("extract_lora: inputs: expected at least one batch, got none")
    if not all(bool(wanted.isfinite().all()) for _, wanted in goals):
        raise ValueError(
            "extract_lora: inputs: expected finite outputs of the tuned model, got NaN or infinity"
        )
    return goals


def fit_outputs(
    model: nn.Module, factors: Sequence[nn.Parameter], goals: Sequence[Goal]
) -> tuple[float, float]:
    """Fit in place with Adam, in eval mode. If the error does not fall, restore the start.

    Args:
        model: Runs on a batch.
        factors: What is fitted.
        goals: See `goals_of`.

    Returns:
        ‖output − wanted‖ / ‖wanted‖ over all goals, before and after.
    """
    norm = sum(float(_counted(b, y).square().sum()) for b, y in goals) or 1.0
    start = [p.detach().clone() for p in factors]
    before = _error(model, goals, norm)
    sizes = [float(p.detach().square().mean().sqrt()) for p in factors]
    groups = [{"params": [p], "lr": _STEP * n} for p, n in zip(factors, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups)
    steps = _PASSES * len(goals)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    try:
        with evaluating(model):
            for batch, wanted in [*goals] * _PASSES:
                loss = _squares(main_output(model, batch), batch, wanted) * (len(goals) / norm)
                gradients = torch.autograd.grad(loss, factors, allow_unused=True)
                for p, g in zip(factors, gradients, strict=True):
                    p.grad = g
                optimizer.step()
                schedule.step()
    finally:
        for p in factors:
            p.grad = None
    after = _error(model, goals, norm)
    if after < before:
        return before, after
    with torch.no_grad():
        for p, old in zip(factors, start, strict=True):
            p.copy_(old)
    return before, before


def _error(model: nn.Module, goals: Sequence[Goal], norm: float) -> float:
    total = sum(float(_squares(output_of(model, b), b, wanted)) for b, wanted in goals)
    return float((total / norm) ** 0.5)


def _squares(output: Tensor, batch: object, wanted: Tensor) -> Tensor:
    return (_counted(batch, output) - _counted(batch, wanted).to(output.device)).square().sum()


def _counted(batch: object, output: Tensor) -> Tensor:
    """Return the outputs at positions that are not padding; without a mask, all of them."""
    parts = [batch, *batch] if isinstance(batch, list | tuple) else [batch]
    for part in parts:
        mask = part.get("attention_mask") if isinstance(part, Mapping) else None
        if isinstance(mask, Tensor) and output.shape[: mask.ndim] == mask.shape:
            return output[mask.to(output.device).bool()]
    return output
