"""Gradients that FSDP2 has not reduced yet, inside an accumulation window.

Micro-batches before the last one add to complete tensors, which FSDP2 keeps beside the sharded
parameters. Nothing is sent for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["set_unreduced_gradients", "unreduced_gradients"]


def unreduced_gradients(module: nn.Module) -> dict[int, Tensor]:
    """Return this rank's sums by id of the sharded parameter, each with the complete shape."""
    found: dict[int, Tensor] = {}
    for held in _fsdp_parameters(module):
        gathered = getattr(held, "_unsharded_param", None)
        gradient = held.unsharded_accumulated_grad
        if gradient is None and gathered is not None:
            gradient = gathered.grad
        if gradient is not None:
            found[id(held.sharded_param)] = gradient
    return found


def set_unreduced_gradients(module: nn.Module, gradients: Mapping[int, Tensor]) -> None:
    """Put sums back, by id of the sharded parameter; the next reduction includes them."""
    for held in _fsdp_parameters(module):
        gradient = gradients.get(id(held.sharded_param))
        if gradient is not None:
            held.unsharded_accumulated_grad = gradient.to(held.sharded_param.device)


def _fsdp_parameters(module: nn.Module) -> Iterator[Any]:
    """Yield FSDP2's record of every sharded parameter."""
    from torch.distributed.fsdp import FSDPModule

    seen: set[int] = set()
    for inner in module.modules():
        if not isinstance(inner, FSDPModule):
            continue
        state: Any = inner._get_fsdp_state()
        if id(state) in seen:  # an embedding and a head that are tied share one
            continue
        seen.add(id(state))
        groups = getattr(state, "_fsdp_param_groups", None)  # torch before 2.13 has one group
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                yield from group.fsdp_params
