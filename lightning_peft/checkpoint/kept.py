"""Which live tensors a checkpoint holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.state_dict import trained_tensors
from lightning_peft.core.modules import persistent_buffers
from lightning_peft.core.names import strip_compile
from lightning_peft.models.history import note_trained, outside_tensors, tensors_to_keep

__all__ = ["kept_base_tensors", "kept_by_live_key", "kept_tensors", "live_tensors"]


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that a checkpoint holds, by canonical key, each tensor once.

    Adapter tensors and running statistics, then `kept_base_tensors`.
    """
    kept = trained_tensors(model)
    return kept | {k: t for k, t in kept_base_tensors(model).items() if k not in kept}


def kept_base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that belong to no adapter, by canonical key.

    What the histories keep (see `models.history`); persistent buffers outside of every adapted
    root.
    """
    note_trained(model)
    buffers = {strip_compile(n) for n in persistent_buffers(model)}
    outside = outside_tensors(model)
    found = {n: t for n, t in outside.items() if n in buffers or t.requires_grad}
    return found | tensors_to_keep(model)


def kept_by_live_key(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `kept_tensors` under their first key in the live state dict."""
    kept = {id(t) for t in kept_tensors(model).values()}
    found: dict[str, Tensor] = {}
    for key, t in live_tensors(model).items():
        if id(t) in kept:
            kept.remove(id(t))
            found[key] = t
    return found


def live_tensors(model: nn.Module) -> dict[str, Any]:
    """Return every key of the model, aliases too.

    The base class's method is called, because a user may override `state_dict`.
    """
    live: dict[str, Any] = nn.Module.state_dict(model, keep_vars=True)
    return live
