"""What code outside of a packed layer finds under the names of its packed parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import Swapped
from lightning_peft.core.outside_reads import OutsideTensor
from lightning_peft.storage.packed import specs_of
from lightning_peft.storage.registry import storage_of

__all__ = ["PackedReads", "stand_in"]


def stand_in(m: nn.Module, name: str, device: torch.device) -> Tensor:
    """Return a tensor of the weight's natural shape and dtype that takes no memory."""
    spec = specs_of(m)[name]
    return torch.empty((), dtype=spec.dtype, device=device).expand(spec.natural_shape)


class PackedReads(Swapped):
    """Mixed into forwards of packed layers: a read from outside gets the dequantised weight."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Called by `state_dict`: adds the scales that a class does not know of."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = {**self._parameters, **self._buffers}
        for name, spec in specs_of(self).items():
            if f"{prefix}{name}" not in destination:
                continue  # the class keeps this weight out of its state
            for key in spec.keys.values():
                tensor = held[key]
                if tensor is not None and f"{prefix}{key}" not in destination:
                    destination[f"{prefix}{key}"] = tensor if keep_vars else tensor.detach()

    def _packed_reader(self, name: str) -> Callable[[nn.Parameter], Tensor] | None:
        spec = specs_of(self).get(name)
        if spec is None or spec.adopted:
            return None

        def form() -> Tensor:
            return storage_of(self, name).read(self, name)

        def read(held: nn.Parameter) -> Tensor:
            if torch.compiler.is_compiling():
                return form()
            label = f"{type(self).__name__} {name}"
            return OutsideTensor.of(held, form, label, lambda: stand_in(self, name, held.device))

        return read
