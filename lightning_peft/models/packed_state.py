"""State dict of a model in its released format: packed weights under the names of its files."""

from __future__ import annotations

import json

from torch import Tensor, nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.storage import held_tensors
from lightning_peft.storage.packed import specs_of

__all__ = ["is_released", "packed_metadata", "packed_state"]


def is_released(model: nn.Module) -> bool:
    """Whether a storage that can write its format holds weights of the model."""
    return any(h.storage.exports for m in model.modules() for h in held_tensors(m).values())


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the base by the format's keys and in its dtypes; adapters are left out."""
    # The base class's method is called, because a user may override `state_dict`.
    found: dict[str, Tensor] = {
        key: t for key, t in nn.Module.state_dict(model).items() if not in_adapter(key)
    }
    for name, module in model.named_modules(remove_duplicate=False):
        held = held_tensors(module)
        if not held or in_adapter(name):
            continue
        storage = next(iter(held.values())).storage
        own = [k for k in (*module._parameters, *module._buffers) if join(name, k) in found]
        exported = storage.export(module)
        for key in own:
            del found[join(name, key)]
        found |= {join(name, key): t for key, t in exported.items()}
    return found


def packed_metadata(model: nn.Module) -> dict[str, str]:
    """Return what files in the format say of each tensor; empty for most formats.

    torchao describes its packed weights, lists all names, and marks the dense ones.
    """
    found = {
        join(name, weight): spec.metadata
        for name, module in model.named_modules(remove_duplicate=False)
        for weight, spec in specs_of(module).items()
        if getattr(spec, "metadata", "")
    }
    if not found:
        return {}
    names = [key for key in nn.Module.state_dict(model) if not in_adapter(key)]
    held = {join(n, key) for n, m in model.named_modules() for key in held_tensors(m)}
    dense = [key for key in names if key not in held]
    plain = json.dumps({"_type": "Tensor"})
    listed = {"tensor_names": json.dumps([*found, *dense])}
    return {**found, **dict.fromkeys(dense, plain), **listed}
