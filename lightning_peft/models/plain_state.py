"""State dict of a model as its library wrote it: no adapter tensors, nothing packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.storage import held_tensors

__all__ = ["dense_base", "plain_state"]


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Return the base by the library's keys: dense tensors as they are, packed ones dequantised.

    Adapters are left out, so the result computes what the model computes only if no adapter acts.
    """
    dense, packed = dense_base(model)
    # The base class's method is called, because a user may override `state_dict`.
    live: dict[str, Any] = nn.Module.state_dict(model)
    own = {k: t for k, t in live.items() if k not in packed and not in_adapter(k)}
    return {k: dense.get(k, own.get(k)) for k in live if k in dense or k in own}


def dense_base(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Return the dequantised weights by live key, and the live keys that hold packed tensors."""
    dense: dict[str, Tensor] = {}
    packed: set[str] = set()
    read: dict[tuple[int, str], Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        held_here = held_tensors(module)
        if held_here:
            packed |= {join(name, key) for key in _own_extras(module)}
        for key, held in held_here.items():
            packed.add(join(name, key))
            place = (id(module), held.weight)
            if place not in read:
                dtype = held.storage.dtype(module, held.weight)
                read[place] = held.storage.read(module, held.weight, dtype).detach()
            dense[join(name, held.weight)] = read[place]
    return dense, packed


def _own_extras(module: nn.Module) -> list[str]:
    """Keys that a layer's class adds to its state dict: scales that are not registered."""
    known = {*module._parameters, *module._buffers}
    state = nn.Module.state_dict(module, keep_vars=True)
    return [k for k in state if k not in known and k.partition(".")[0] not in module._modules]
