"""State dict of a model in its released format: packed weights under the names of its files."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.storage import held_tensors

__all__ = ["is_released", "packed_state"]


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
