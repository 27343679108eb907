"""Copies of adapters on a frozen copy of the adapted part, such as an EMA teacher.

Code that averages a student into a teacher walks through `parameters()` of both. So the teacher
gets copies of the student's adapters: never trained, saved with the others. They leave the
teacher's function as it is, so copies of adapters that begin at random begin at zero.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lightning_peft.adapters.placement.checks import check_swappable
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import strip_compile
from lightning_peft.core.registry import AdapterEntry, ensure_registry, join_registry, registries_in
from lightning_peft.layers.adapted import adapt, adapted_modules, adapters_of, refresh
from lightning_peft.layers.adapter import Adapter
from lightning_peft.models.fingerprint import fingerprint
from lightning_peft.models.frozen_parts import FrozenCopy, frozen_copies, inside
from lightning_peft.storage import storage_of

__all__ = ["can_follow", "follow", "follow_outside", "teachers_outside"]


def can_follow(student: nn.Module) -> bool:
    """Whether the adapters of a part have no hooks elsewhere, so that they can be copied."""
    return not any(a.has_hooks for _, m in adapted_modules(student) for a in adapters_of(m))


def follow(student: nn.Module, teacher: nn.Module, adapter_name: str) -> None:
    """Copy the adapters of one name from the student to the same places of the teacher.

    Args:
        student: A part with adapters.
        teacher: A part of the same structure; its modules' classes are swapped.
        adapter_name: Name of the adapter.
    """
    pairs = [(m, teacher.get_submodule(n)) for n, m in base_modules(student).items()]
    memo: dict[int, Any] = {id(one): other for one, other in pairs}
    found = [(n, m) for n, m in adapted_modules(student) if adapter_name in m.peft]
    for _, module in found:
        for adapter in adapters_of(module, adapter_name):
            for shared in (adapter.site.ops, adapter.site.storage, adapter.method):
                memo[id(shared)] = shared
    for name, _ in found:
        check_swappable(name, teacher.get_submodule(name))
    copies = copy.deepcopy({n: m.peft[adapter_name] for n, m in found}, memo)
    for name, module in found:
        target = adapt(teacher.get_submodule(name), module._peft.ops)
        target.peft[adapter_name] = copies[name]
        target._peft.active.names = list(module._peft.active.names)
        for adapter in adapters_of(target, adapter_name):
            _start_following(adapter)
        refresh(target)


def _start_following(adapter: Adapter) -> None:
    adapter.follows = True
    adapter.requires_grad_(False)
    adapter.site.storage = storage_of(adapter.site.module, adapter.site.parameter)
    adapter.keep_function_of_base()


def teachers_outside(model: nn.Module) -> list[FrozenCopy]:
    """Return the frozen copies, outside of every adapted root, of a root or of a part of one."""
    roots = [strip_compile(p) for p, _, registry in registries_in(model) if registry.adapters]
    if not roots or "" in roots:
        return []
    return [
        pair
        for pair in frozen_copies(model)
        if inside(pair.student, roots) and not inside(pair.teacher, roots)
    ]


def follow_outside(model: nn.Module) -> None:
    """Let the teachers outside of the adapted roots follow; each becomes a root of its own."""
    for pair in teachers_outside(model):
        student, teacher = (model.get_submodule(name) for name in pair)
        if not can_follow(student):
            continue
        registry = ensure_registry(teacher)
        registry.fingerprint = fingerprint(teacher)
        registry.requires_grad = {n: p.requires_grad for n, p in teacher.named_parameters()}
        for _, root, source in list(registries_in(model)):
            if root is teacher or not any(m is student for m in base_modules(root).values()):
                continue
            for name, entry in source.adapters.items():
                follow(student, teacher, name)
                registry.adapters[name] = AdapterEntry(entry.methods, sites=_sites(teacher, name))
            registry.active = list(source.active)
        for _, module in adapted_modules(teacher):
            join_registry(module, registry)


def _sites(teacher: nn.Module, adapter_name: str) -> list[tuple[str, tuple[int, ...], str]]:
    found = []
    for name, module in adapted_modules(teacher):
        for adapter in adapters_of(module, adapter_name):
            adapter.site.name = name
            found.append((adapter.site.label, tuple(adapter.site.shape), adapter.method.label))
    return found
