"""The layers of a model that read one tensor, by the architecture table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_peft.core.modules import is_adapter_child
from lightning_peft.models.target_table import SHARED_INPUTS, SharedInput

__all__ = ["children_sharing_input"]


def children_sharing_input(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Yield (module, names of its children that read one tensor), the first called in front.

    The innermost transformers config around a module that the table knows decides. A model without
    such a config yields nothing.
    """
    return _walk(model, (), (), set())


def _walk(
    module: nn.Module, path: tuple[str, ...], declared: Sequence[SharedInput], seen: set[int]
) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if isinstance(model_type, str):
        declared = SHARED_INPUTS.get(model_type, declared)
    taken: set[str] = set()
    for children, inside in declared:
        if inside and inside not in path:
            continue
        names = tuple(n for n in children if n in module._modules and n not in taken)
        if len(names) > 1:
            taken.update(names)
            yield module, names
    for name, child in module._modules.items():
        if child is None or not child._modules or is_adapter_child(module, name):
            continue
        yield from _walk(child, (*path, name), declared, seen)
