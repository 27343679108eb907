"""The layers of a model that could be adapted, for messages."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_peft.core.names import in_adapter
from lightning_peft.layers import editable_ops

__all__ = ["adaptable_layers"]


def adaptable_layers(model: nn.Module, fits: Callable[[str], bool]) -> str:
    """Return a few layers that could be named instead, with their classes; "" if there are none."""
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name and not in_adapter(name) and fits(name) and editable_ops(module) is not None:
            kinds.setdefault(type(module).__name__, []).append(name)
    found = [f"{', '.join(names[:3])} ({kind} ×{len(names)})" for kind, names in kinds.items()]
    return "; ".join(found[:5])
