"""What the autograd functions share: how they are called, gradients of their gradients, rows of the
last axis in and out, sums in place, autocast off around them.

Backward by hand reads what forward kept; to autograd that is constant. So a backward that is itself
recorded (`create_graph`, for a gradient penalty or a product with the Hessian) does not run by
hand: it takes the gradients of the formula in torch's own operations, from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "add_product",
    "added",
    "applied",
    "autocast_off",
    "flat",
    "gradients_of",
    "recording",
    "refuse_recording",
    "transformed",
    "unflat",
]


class _NoGraph:
    """Stands for an autograd function's context where nothing will run backward."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def save_for_backward(self, *_: Tensor | None) -> None:
        """Nothing to do."""

    def mark_dirty(self, *_: Tensor) -> None:
        """Nothing to do."""


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``; without gradients the forward alone.

    Its bookkeeping, a tenth of a step of generation from a small model, is for a graph.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return function.forward(_NoGraph(len(args)), *args)


def transformed() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jacrev) runs: it takes torch's operations
    alone.
    """
    return bool(torch._C._are_functorch_transforms_active())  # type: ignore[attr-defined]


def recording() -> bool:
    """In a backward: whether it is recorded itself. (A compiled backward never is.)"""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_of(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dY: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again; None for inputs that need none.

    Args:
        formula: In torch's own operations: what the function computes of `inputs`.
        inputs: As they were given to the function, and saved.
        needs: Whether each needs its gradient.
        dY: Of the formula's result, or of its results.
    """
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    if not wanted:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(formula(*inputs), wanted, dY, create_graph=True))
    return [next(found) if need else None for need in needs]


def refuse_recording(what: str, instead: str) -> None:
    """For a function that keeps less than its inputs.

    Raises:
        RuntimeError: this backward is recorded.
    """
    if recording():
        raise RuntimeError(
            f"{what}: expected a backward that is not differentiated again, got create_graph=True; "
            f"{instead}"
        )


def autocast_off(device: str) -> AbstractContextManager[None]:
    """What was cast before stays so; costs nothing where autocast is off already."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def flat(x: Tensor) -> Tensor:
    """Rows of the last axis: [..., K] → [M, K]."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def unflat(y: Tensor, like: Tensor) -> Tensor:
    """[M, N] → [..., N] with the leading axes of `like`; no view: the caller may go on in place."""
    if like.ndim == 2:
        return y
    unviewed: Tensor = torch.ops.aten._unsafe_view(y, (*like.shape[:-1], y.shape[-1]))
    return unviewed


def added(y: Tensor, other: Tensor) -> Tensor:
    """Y + other, in place.

    Not while compiling: under torch 2.11 a traced function that returns what it changed in place
    gives no gradients, without a word.
    """
    return y + other if torch.compiler.is_compiling() else y.add_(other)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Y + a b, in place but while compiling (see `added`)."""
    return y.addmm(a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)
