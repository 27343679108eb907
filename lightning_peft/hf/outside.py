"""Modules that are trained next to the model whose names a peft directory uses: a head of the user.

Peft cannot place them, so they have a file of their own, which peft does not read. Its keys are
those of the module that was saved, for instance ``classifier.weight``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import in_adapter, join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.hf.files import BATCHES, read_file
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.models import history

__all__ = [
    "OUTSIDE",
    "OutsideModules",
    "outside_tensors",
    "read_outside",
    "trained_outside",
    "warn_of_left_out",
]

OUTSIDE = "trained_modules.safetensors"
_KEY = "modules"


def outside_tensors(
    model: nn.Module, names: Sequence[str], adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the modules as they are trained, and the header of the file."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        state = {k: t for k, t in module.state_dict().items() if not in_adapter(k)}
        for inner, adapted in adapted_modules(module):
            for adapter in adapters_of(adapted, adapter_name):
                state |= {join(inner, path): copy for path, copy in adapter.substitutes().items()}
        tensors |= {join(name, k): t for k, t in state.items() if t.is_floating_point()}
    return tensors, {_KEY: json.dumps(list(names))}


def trained_outside(model: nn.Module) -> list[str]:
    """Names of the modules outside of adapted roots that were trained in place: ``PEFT(root=)``.

    A part that is frozen at the moment, such as an EMA teacher, is none of them.
    """
    outside = history.outside_tensors(model)
    changed = outside.keys() & set(history.changed_base(model)) if outside else set[str]()
    found: list[str] = []
    for path, module in base_modules(model).items():
        name = strip_compile(path)
        if not name or f"{name}.".startswith(tuple(f"{n}." for n in found)):
            continue
        own = {join(name, n): t for n, t in history.base_tensors(module).items()}
        parameters = {n for n, t in own.items() if isinstance(t, nn.Parameter)}
        is_trained = bool(parameters) and parameters <= changed
        is_trained |= not module._modules and bool(own.keys() & changed)
        is_trained &= any(p.requires_grad for p in module.parameters())
        if is_trained and own.keys() <= outside.keys():
            found.append(name)
    return found


def warn_of_left_out(model: nn.Module, adapter_name: str, outside: Sequence[str]) -> None:
    """Say which trained parameters, and which moved tensors of the base, no directory holds.

    Args:
        model: The model.
        adapter_name: Name of the adapter.
        outside: Names of the modules that are written beside the adapter.
    """
    loose = [join(prefix, name) for prefix, _, r in registries_in(model) for name in r.loose]
    if loose:
        warnings.warn(
            f"save_adapter: left out: {', '.join(loose)}, trained in place; a checkpoint holds "
            "them, or put them into a module of their own",
            stacklevel=3,
        )
    saved = [
        strip_compile(join(prefix, name))
        for prefix, _, registry in registries_in(model)
        if adapter_name in registry.adapters
        for name in registry.adapters[adapter_name].modules_to_save
    ]
    written = tuple(f"{name}." for name in (*saved, *outside))
    found = [n for n in history.changed_base(model) if n not in loose and not n.startswith(written)]
    changed = [n for n in found if n.rpartition(".")[2] != BATCHES]
    if changed:
        warnings.warn(
            f"save_adapter: left out: {len(changed)} tensors of the base that training changed, "
            f"such as {', '.join(changed[:3])}; an adapter's directory has no place for them, so "
            "the loaded model computes other values. A checkpoint holds them, merge_and_unload() "
            "gives a model with them, and modules_to_save exports the modules it names",
            stacklevel=3,
        )


@dataclass
class OutsideModules:
    """The modules of such a file that the caller's model has.

    Attributes:
        names: Names of the modules.
        tensors: Their tensors by full name.
        notes: Modules that are left out.
    """

    names: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def copy_into(self, model: nn.Module, adapter_name: str) -> int:
        """Copy the values into the trained copies and the buffers; returns how many."""
        if not self.tensors:
            return 0
        copies = {
            join(name, path): copy
            for name, module in adapted_modules(model)
            for adapter in adapters_of(module, adapter_name)
            for path, copy in adapter.substitutes().items()
        }
        places: Mapping[str, Tensor] = {**dict(model.named_buffers()), **copies}
        with torch.no_grad():
            for key, value in self.tensors.items():
                places[key].copy_(value)
        return len(self.tensors)


def read_outside(model: nn.Module, directory: Path) -> OutsideModules:
    """Read the file of a directory, if it has one, and compare it with the model.

    Raises:
        ValueError: a module of the model has other tensors, or others of that shape.
    """
    file = directory / OUTSIDE
    if not file.is_file():
        return OutsideModules()
    tensors, metadata = read_file(file)
    found = OutsideModules()
    modules = base_modules(model)
    for name in _module_names(metadata, file):
        mine = {k: t for k, t in tensors.items() if k.startswith(f"{name}.")}
        if name not in modules:
            found.notes.append(f"{name}: left out, {type(model).__name__} has no such module")
            continue
        state = {join(name, k): t for k, t in modules[name].state_dict().items()}
        wanted = {
            k: list(t.shape)
            for k, t in state.items()
            if t.is_floating_point() and not in_adapter(k)
        }
        have = {k: list(t.shape) for k, t in mine.items()}
        if wanted != have:
            raise ValueError(
                f"{file}: expected the tensors of {name!r}, {wanted}, got {have}; build the module "
                "as it was trained; nothing was loaded"
            )
        found.names.append(name)
        found.tensors |= mine
    return found


def _module_names(metadata: Mapping[str, str], file: Path) -> list[str]:
    try:
        names = json.loads(metadata.get(_KEY, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{file}: expected a list of module names as {_KEY!r} in the header, got "
            f"{metadata[_KEY][:80]!r}; save the adapter again"
        )
    return names
