"""The state that an optimizer class keeps per parameter, found by one step of a new instance."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.optim.optimizers import PooledOptimizer

__all__ = ["TrialStates", "form_problems", "tensors_of"]

State = Mapping[str, Any]


class TrialStates:
    """States after one step of a new optimizer of the live class, with the options of the file.

    The step is on a small parameter with as many dimensions as the real one.

    Args:
        optimizer: The live optimizer.
        groups: Parameter groups of the file.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self._found: dict[tuple[int, torch.Size], State | None] = {}

    def of(self, p: Tensor, group: int) -> State | None:
        """Return the state of a parameter like `p` in a group; None if it cannot be tried."""
        if isinstance(self._optimizer, PooledOptimizer):
            return None
        key = group, torch.Size(min(size, 2 + i) for i, size in enumerate(p.shape))
        if key not in self._found:
            self._found[key] = self._try(*key)
        return self._found[key]

    def _try(self, group: int, shape: torch.Size) -> State | None:
        weight = nn.Parameter(torch.zeros(shape))
        signs = torch.arange(weight.numel()).remainder(2).mul(2).sub(1)
        # Both signs, so that every state that can be negative is.
        weight.grad = signs.reshape(shape).to(weight.dtype)
        options = {**self._optimizer.param_groups[group], **self._groups[group]}
        options |= {"params": [weight], "fused": None, "foreach": None, "capturable": False}
        options.pop("param_names", None)
        kind = type(self._optimizer)
        try:
            accepted = inspect.signature(kind).parameters
            trial = kind(**{k: v for k, v in options.items() if k in accepted})
            trial.step()
        except Exception:  # a user's class whose arguments are unknown
            return None
        return dict(trial.state[weight])


def tensors_of(state: State) -> set[str]:
    """Return the names of the tensors in a state."""
    return {name for name, value in state.items() if isinstance(value, Tensor)}


def form_problems(state: State, trial: State, p: Tensor, *, sharded: bool) -> Iterator[str]:
    """Yield the tensors of a stored state with a shape, dtype or sign that no run produces."""
    for name in sorted(tensors_of(state) & tensors_of(trial)):
        value, like = state[name], trial[name]
        want = _size(like, p)
        if value.is_floating_point() != like.is_floating_point() or value.is_complex():
            yield f"{name}: expected a tensor like {like.dtype}, got {value.dtype}"
        elif not sharded and value.numel() != want.numel():
            yield f"{name}: expected shape {list(want)}, got {list(value.shape)}"
        elif value.numel() and bool((like >= 0).all()) and bool((value < 0).any()):
            yield f"{name}: expected values of at least 0, got {float(value.min())}"


def _size(like: Tensor, p: Tensor) -> torch.Size:
    """Return the shape that a tensor of the trial state has for the real parameter."""
    if like.ndim != p.ndim:
        return like.shape
    small = [min(size, 2 + i) for i, size in enumerate(p.shape)]
    sizes = zip(like.shape, small, p.shape, strict=True)
    return torch.Size(real if own == tried else own for own, tried, real in sizes)
