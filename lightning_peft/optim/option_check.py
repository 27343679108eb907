"""Checks the options of a stored optimizer group against those of the live one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.optim.optimizers import PooledOptimizer

__all__ = ["is_number", "numbers_in", "option_problems"]

_LARGEST = float(torch.finfo(torch.float32).max)


def option_problems(
    optimizer: Optimizer, saved: Mapping[str, Any], live: Mapping[str, Any]
) -> Iterator[str]:
    """Yield options that differ in form from the live ones, or have an impossible value."""
    ours = set(optimizer.DEFAULTS) - {"lr"} if isinstance(optimizer, PooledOptimizer) else set()
    for key in optimizer.defaults:
        if key not in saved and key not in ours and numbers_in(live.get(key)):
            yield f"{key}: missing"
    for key, value in saved.items():
        want = live.get(key)
        numbers = numbers_in(want)
        if key == "params" or not numbers or not all(map(math.isfinite, numbers)):
            continue
        got = numbers_in(value)
        kinds = (bool, list | tuple) if key == "lr" else (bool, list | tuple, Tensor)
        same = all(isinstance(value, kind) == isinstance(want, kind) for kind in kinds)
        if len(got) != len(numbers) or not same:
            yield f"{key}: expected {_form(want)}, got {str(value)[:40]!r}"
        elif any(abs(x) > _LARGEST for x in got):
            yield f"{key}: expected finite numbers, got {str(value)[:40]}"
        elif any(x < 0 <= y for x, y in zip(got, numbers, strict=True)):
            yield f"{key}: expected at least 0, got {value}"
        elif key == "betas" and any(x >= 1 for x in got):
            yield f"{key}: expected numbers below 1, got {value}"


def _form(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    return f"{len(value)} numbers" if isinstance(value, list | tuple) else "a number"


def is_number(value: object) -> bool:
    """Whether an option or a step is one number; a tensor of one element is."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float)


def numbers_in(value: object) -> list[float]:
    """Return the numbers in an option. NaN becomes infinity, which comparisons catch."""
    if isinstance(value, Tensor):
        return numbers_in(value.item()) if value.numel() == 1 and not value.is_complex() else []
    if isinstance(value, list | tuple):
        return [x for each in value for x in numbers_in(each)]
    if isinstance(value, float) and math.isnan(value):
        return [math.inf]
    try:
        return [float(value)] if isinstance(value, int | float) else []
    except OverflowError:  # an integer beyond the range of floats
        return [math.inf]
