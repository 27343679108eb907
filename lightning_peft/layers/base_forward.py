"""The base call inside an adapted forward: the class underneath, on parameters as they are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import PackedForward, base_class
from lightning_peft.core.modules import own_tensor
from lightning_peft.core.outside_reads import own_forward

if TYPE_CHECKING:
    from lightning_peft.layers.base import MatrixOps

__all__ = ["run_base"]

_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def run_base(
    ops: MatrixOps,
    m: nn.Module,
    run: Callable[..., Any],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Return the output of the class underneath for the input x.

    What code outside of the layer reads under ``weight`` is W' (see `core.outside_reads`). The base
    must not read that. A plain layer is called as a function of its parameters; the forward of any
    other class runs with its parameters uncovered.

    Args:
        ops: The layer's kind.
        m: The layer.
        run: The forward of the class underneath.
        x: The input.
        args: Further arguments of the forward.
        kwargs: Further arguments by name.
    """
    if not args and not kwargs and _is_plain(m):
        W = own_tensor(m, "weight")
        if W is not None:
            return ops.functional(m, x, W, ops.bias_of(m))
    if torch.compiler.is_compiling():
        held = {n: p for n, p in m._parameters.items() if p is not None and n not in vars(m)}
        with ops.substituted(m, held):
            return run(x, *args, **kwargs)
    with own_forward(m):
        return run(x, *args, **kwargs)


def _is_plain(m: nn.Module) -> bool:
    """Whether the module's forward is a function of x, weight and bias, and no more."""
    if isinstance(m, PackedForward):
        return False
    base = base_class(m)
    return base.__name__ == "Conv1D" or base.forward in _PLAIN_FORWARDS
