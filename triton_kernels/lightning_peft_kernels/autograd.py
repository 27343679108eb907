"""Shared parts of the autograd functions: calling them, double backward, rows, sums in place.

A hand-written backward reads tensors that forward saved. Autograd sees those as constants, so a
double backward (`create_graph`, for gradient penalties or Hessian products) cannot go through it.
Such a backward differentiates the formula in torch's own operations instead, from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.chips import CHIPS

__all__ = [
    "PLAIN_TYPES",
    "Context",
    "Grads",
    "KernelFunction",
    "add_maybe_inplace",
    "add_product",
    "apply_or_forward",
    "autocast_off",
    "check_no_double_backward",
    "flatten_rows",
    "gradients_of",
    "in_functorch_transform",
    "is_double_backward",
    "is_plain_eager",
    "scaled_linear",
    "unflatten_rows",
]

#: Types of tensors whose bytes kernels may read without torch's dispatcher.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
#: Return type of a backward: one entry per argument of forward.
Grads = tuple[Tensor | None, ...]


class Context(Protocol):
    """The `ctx` of an autograd function.

    A function that saves more than tensors derives a protocol that declares the attributes.

    Attributes:
        needs_input_grad: If True, the argument at this position needs its gradient.
    """

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What forward saved, in order. Typed as tensors; an entry may be None."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save tensors for backward."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Tell autograd that forward changes these tensors in place."""


if TYPE_CHECKING:

    class KernelFunction(torch.autograd.Function):
        """`torch.autograd.Function` whose methods may declare their own arguments."""

        forward: ClassVar[Callable[..., Any]]
        backward: ClassVar[Callable[..., Any]]
        apply: ClassVar[Callable[..., Any]]

else:
    KernelFunction = torch.autograd.Function


class _NoGraph:
    """Replaces the context of an autograd function if no backward follows."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save nothing: no backward reads it."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Mark nothing: there is no graph to check."""


def apply_or_forward(function: type[KernelFunction], *args: Any) -> Any:
    """Return ``function.apply(*args)``; without gradients, only run its forward.

    The bookkeeping of `apply` takes a tenth of a generation step of a small model.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_NoGraph(len(args)), *args)


def in_functorch_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jacrev) is active.

    Transforms accept torch's own operations only.
    """
    return bool(torch._C._are_functorch_transforms_active())


def is_plain_eager(device: str) -> bool:
    """Whether neither compilation, nor autocast on `device`, nor a `torch.func` transform is on."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled(device)
        or torch.compiler.is_compiling()
    )


def is_double_backward() -> bool:
    """Inside a backward: whether autograd records it. A compiled backward is never recorded."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_of(
    formula: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dY: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Return differentiable gradients; None for inputs that need none.

    Args:
        formula: Computes the function's result from `inputs` in torch's own operations.
        inputs: Tensors as given to the function, saved by forward.
        needs: If True, the input at this position needs its gradient.
        dY: Gradient of the formula's result, or of each result.
    """
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    if not wanted:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(formula(*inputs), wanted, dY, create_graph=True))
    return [next(found) if need else None for need in needs]


def check_no_double_backward(name: str, remedy: str) -> None:
    """Check that autograd does not record this backward, for functions that drop their inputs.

    Args:
        name: Function, for the message.
        remedy: What the user should do instead.

    Raises:
        RuntimeError: Autograd records this backward.
    """
    if is_double_backward():
        raise RuntimeError(
            f"{name}: expected a backward that is not differentiated again, got create_graph=True; "
            f"{remedy}"
        )


def autocast_off(device: str) -> AbstractContextManager[None]:
    """Return a context without autocast on `device`; free if autocast is off already."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def flatten_rows(x: Tensor) -> Tensor:
    """Reshape [..., K] to rows [M, K]."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def unflatten_rows(y: Tensor, like: Tensor) -> Tensor:
    """Reshape rows [M, N] to [..., N] with the leading axes of `like`.

    The result is no view for autograd, so the caller may change it in place.
    """
    if like.ndim == 2:
        return y
    unviewed: Tensor = torch.ops.aten._unsafe_view(y, (*like.shape[:-1], y.shape[-1]))
    return unviewed


def scaled_linear(x: Tensor, A: Tensor, scaling: float) -> Tensor:
    """Compute ``scaling · x Aᵀ`` [M, R] of x [M, K] and A [R, K] in one launch on a GPU."""
    if scaling == 1.0:
        return torch.nn.functional.linear(x, A)
    if torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, A) * scaling
    if x.device.type == "cpu" and x.device not in CHIPS:  # no launch to spare, and a short pass
        return torch.nn.functional.linear(x, A).mul_(scaling)
    # With β = 0 the first argument is not read.
    return torch.addmm(x.new_empty(()), x, A.mT, beta=0, alpha=scaling)


def add_maybe_inplace(y: Tensor, other: Tensor) -> Tensor:
    """Return ``y + other``, in place except while compiling.

    In torch 2.11 a traced function that returns a tensor changed in place silently loses its
    gradients.
    """
    return y + other if torch.compiler.is_compiling() else y.add_(other)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``y + a b``, in place except while compiling (see `add_maybe_inplace`)."""
    return y.addmm(a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)
