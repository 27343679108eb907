"""Memory for the tensors of a model that was built on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_peft.core.modules import tied_parameters
from lightning_peft.core.names import in_adapter
from lightning_peft.storage.registry import held_tensors

__all__ = ["materialize"]


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give every meta tensor memory; buffers that no file holds get their values again.

    Raises:
        RuntimeError: a buffer has no known value.
    """
    lost = [
        (name, module)
        for name, module in model.named_modules()
        if not in_adapter(name)
        and any(b is not None and b.device.type == "meta" for b in module._buffers.values())
    ]
    tied = tied_parameters(model)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
    for first, *others in tied:
        for place in others:
            place.module._parameters[place.key] = first.module._parameters[first.key]
    for name, module in lost:
        if held_tensors(module):
            continue  # companions of a weight: written with it
        owner = _owner(model, name)
        if owner is None or not hasattr(module, "original_inv_freq"):
            raise RuntimeError(
                f"{name!r}: expected its buffers {list(module._buffers)} to have values, found "
                "them on the meta device; build the module that owns them outside of "
                "torch.device('meta')"
            )
        owner._init_weights(module)


def _owner(model: nn.Module, name: str) -> Any:
    """The innermost enclosing Hugging Face model."""
    found = None
    for path, module in model.named_modules():
        encloses = not path or name.startswith(f"{path}.")
        if encloses and hasattr(module, "_init_weights"):
            found = module
    return found
