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
from lightning_peft.core.names import in_adapter, join
from lightning_peft.core.registry import registries_in
from lightning_peft.hf.files import read_file
from lightning_peft.layers.adapted import adapted_modules, adapters_of

__all__ = [
    "OUTSIDE",
    "OutsideModules",
    "outside_tensors",
    "read_outside",
    "warn_of_new_parameters",
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


def warn_of_new_parameters(model: nn.Module) -> None:
    """Say which trained parameters belong to no module that a directory could hold."""
    names = [join(prefix, name) for prefix, _, r in registries_in(model) for name in r.loose]
    if names:
        warnings.warn(
            f"save_adapter: left out: {', '.join(names)}, trained in place; a checkpoint holds "
            "them, or put them into a module of their own",
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
    for name in json.loads(metadata.get(_KEY, "[]")):
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
