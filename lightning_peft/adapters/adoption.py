"""Layers of other libraries that arrive quantised: taken over before planning, given back later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_peft.core.class_swap import PackedForward, swap_in, swap_out
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import in_adapter
from lightning_peft.core.registry import ensure_registry
from lightning_peft.layers import ops_for
from lightning_peft.storage import foreign_storage

__all__ = ["adopted_layers", "release_adopted"]


@contextmanager
def adopted_layers(model: nn.Module) -> Iterator[None]:
    """Take over every foreign quantised layer, adapted later or not: all must pass gradients.

    The model's registry remembers the layers, so that `detach` gives them back. If the block
    raises, they are given back at once.

    Raises:
        ValueError: tensors or a kind of layer that cannot be taken over; nothing is changed.
    """
    names: list[str] = []
    try:
        for name, module in base_modules(model).items():
            if in_adapter(name) or isinstance(module, PackedForward):
                continue
            if _adopt(name, module):
                names.append(name)
        yield
    except BaseException:
        release_adopted(model, names)
        raise
    if names:
        ensure_registry(model).adopted += names


def _adopt(name: str, module: nn.Module) -> bool:
    storage = foreign_storage(module)
    if storage is None:
        return False
    storage.adopt(module)
    ops = ops_for(module)
    layout = None if ops is None else ops.weight_layout(module)
    if layout is None:
        storage.release(module)
        raise ValueError(
            f"{name!r}: expected a kind of layer whose weight a storage can hold, got "
            f"{type(module).__name__} in {storage.label}; register its kind of layer"
        )
    swap_in(module, layout.foreign_forward)
    return True


def release_adopted(model: nn.Module, names: Sequence[str]) -> None:
    """Give layers back to the library that made them; names that are gone are passed over."""
    modules = base_modules(model)
    for name in names:
        module = modules.get(name)
        mixin: Any = vars(type(module)).get("_swap_mixin")
        if module is None or mixin is None or not issubclass(mixin, PackedForward):
            continue
        swap_out(module, mixin)
        storage = foreign_storage(module)
        if storage is not None:
            storage.release(module)
