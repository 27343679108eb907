"""Layers of other libraries that arrive quantised: adopted before planning, given back later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_peft.core.class_swap import PackedForward, rebind_forward, swap_in, swap_out
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import in_adapter, quoted
from lightning_peft.core.registry import ensure_registry
from lightning_peft.layers import ops_for
from lightning_peft.models.frozen_parts import inside
from lightning_peft.models.saving import is_transformers_model
from lightning_peft.storage import foreign_storage, held_tensors
from lightning_peft.storage.packed import specs_of

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
        modules = base_modules(model)
        for name, module in modules.items():
            if in_adapter(name) or isinstance(module, PackedForward):
                continue
            if _adopt(name, module):
                names.append(name)
        _tell_dtypes(modules, names)
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
    try:
        storage.adopt(module)
    except ValueError as error:
        raise ValueError(f"{quoted(name)}: {error}") from None
    forward = storage.foreign_forward(module)
    ops = ops_for(module)
    layout = None if ops is None else ops.weight_layout(module)
    if forward is None and layout is not None:
        forward = layout.foreign_forward
    if forward is None:
        storage.release(module)
        raise ValueError(
            f"{quoted(name)}: expected a kind of layer whose weight a storage can hold, got "
            f"{type(module).__name__} in {storage.label}; register its kind of layer"
        )
    swap_in(module, forward)
    rebind_forward(module)
    return True


def _tell_dtypes(modules: dict[str, nn.Module], names: Sequence[str]) -> None:
    """Tell each adopted layer the dtype that its model computes in.

    It is the dtype of most dense weights of the innermost Hugging Face model around the layer, or
    of the whole model; without dense weights it is the config's.
    """
    found: dict[str, torch.dtype | None] = {}
    for name in names:
        around = _enclosing(modules, name)
        if around not in found:
            found[around] = _dense_dtype(modules, around)
        dtype, storage = found[around], foreign_storage(modules[name])
        if dtype is not None and storage is not None:
            storage.set_compute_dtype(modules[name], dtype)


def _enclosing(modules: dict[str, nn.Module], name: str) -> str:
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        around = ".".join(parts[:n])
        if is_transformers_model(modules[around]):
            return around
    return ""


def _dense_dtype(modules: dict[str, nn.Module], around: str) -> torch.dtype | None:
    sizes: dict[torch.dtype, int] = {}
    for name, module in modules.items():
        if in_adapter(name) or not inside(name, [around]):
            continue
        held = held_tensors(module)
        for key, p in module._parameters.items():
            if p is not None and key not in held and _is_dense_matrix(p):
                sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    if sizes:
        return max(sizes, key=lambda dtype: sizes[dtype])
    dtype = getattr(getattr(modules[around], "config", None), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _is_dense_matrix(p: nn.Parameter) -> bool:
    return p.ndim > 1 and p.is_floating_point() and p.element_size() > 1


def release_adopted(model: nn.Module, names: Sequence[str]) -> None:
    """Give layers back to the library that made them. Names that no longer exist are skipped."""
    modules = base_modules(model)
    for name in names:
        module = modules.get(name)
        mixin: Any = vars(type(module)).get("_swap_mixin")
        if module is None or mixin is None or not issubclass(mixin, PackedForward):
            continue
        if not any(spec.adopted for spec in specs_of(module).values()):
            continue  # transcoded since
        swap_out(module, mixin)
        rebind_forward(module)
        storage = foreign_storage(module)
        if storage is not None:
            storage.release(module)
