"""The structure of a model at one moment, restored when a change fails halfway.

Only references are kept: classes, attributes, parameters, buffers, hooks. Whoever writes
contents in place restores them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_peft.core.modules import base_modules, modules_by_name
from lightning_peft.core.registry import registry_of
from lightning_peft.layers.adapted import is_adapted, unsettled_entries, weight_adapters_of
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["ModelSnapshot"]

#: Attributes of modules that are changed in place.
_CONTAINERS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_packed",
)


class ModelSnapshot:
    """Structure of a model: module by module, with the state of the adapters that may change.

    An attach switches off the adapters that act and leaves the idle ones alone, so their modules
    are not visited; it renames them all if the model gets a new root (`rehome`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[int, _ModuleStructure] = {}
        self._adapters: list[tuple[WeightAdapter, str, bool]] = []
        is_root = registry_of(model) is not None
        for m in base_modules(model).values():
            self.renew(m)
            if not is_adapted(m):
                continue
            self.renew(m.peft)
            changing = unsettled_entries(m) if is_root else list(m.peft)
            for name in changing:
                for inner in modules_by_name(m.peft[name]).values():
                    self.renew(inner)
                self._adapters += [
                    (a, a.site.name, a.rewrite is not None and a.rewrite.active)
                    for a in weight_adapters_of(m, name)
                ]

    def renew(self, module: nn.Module) -> None:
        """Replace what is remembered of one module, so that `restore` keeps its present state."""
        self._modules[id(module)] = _ModuleStructure(module)

    def restore(self, built: Iterable[WeightAdapter] = ()) -> None:
        """Restore the structure.

        Args:
            built: Adapters built since. The base weights that their initialisation replaced are
                put back bit for bit.
        """
        for adapter in built:
            adapter.switch_base(False, was_interrupted=True)
        for adapter, name, active in self._adapters:
            adapter.switch_base(active, was_interrupted=True)
            adapter.site.name = name
        for structure in self._modules.values():
            structure.restore()


class _ModuleStructure:
    """Class, attributes and parameters of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.attributes = dict(vars(module))
        held = [self.attributes.get(name) for name in _CONTAINERS]
        self.empty = [container for container in held if container is not None and not container]
        self.filled = [(container, container.copy()) for container in held if container]
        own = [p for p in module._parameters.values() if p is not None]
        self.parameters = [(p, p.data, p.requires_grad) for p in own]
        records: list[Any] = [module._peft, module._peft.active] if is_adapted(module) else []
        registry = registry_of(module)
        self.records = [_Record(r) for r in [*records, registry] if r is not None]

    def restore(self) -> None:
        """Restore the structure; only references are set."""
        module = self.module
        if type(module) is not self.cls:
            module.__class__ = self.cls
        vars(module).clear()
        vars(module).update(self.attributes)
        for container in self.empty:
            container.clear()
        for container, contents in self.filled:
            container.clear()
            container.update(contents)
        for p, data, requires_grad in self.parameters:
            if p.dtype != data.dtype or p.data_ptr() != data.data_ptr():
                p.data = data
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        for record in self.records:
            record.restore()


class _Record:
    """The fields of a dataclass; lists, dicts and sets are copied."""

    def __init__(self, record: Any) -> None:
        self.record = record
        self.fields = {f.name: _copied(getattr(record, f.name)) for f in dataclasses.fields(record)}

    def restore(self) -> None:
        for name, value in self.fields.items():
            setattr(self.record, name, value)


def _copied(value: object) -> Any:
    return value.copy() if isinstance(value, list | dict | set) else value
