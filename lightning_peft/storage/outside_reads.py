"""What code outside of a packed layer finds under the names of its packed parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft.core.outside_reads import OutsideTensor
from lightning_peft.storage.packed import specs_of
from lightning_peft.storage.registry import storage_of

__all__ = ["PackedReads", "stand_in"]


def stand_in(m: nn.Module, name: str, device: torch.device) -> Tensor:
    """Return a tensor of the weight's natural shape and dtype that takes no memory."""
    spec = specs_of(m)[name]
    return torch.empty((), dtype=spec.dtype, device=device).expand(spec.natural_shape)


class PackedReads:
    """Mixed into forwards of packed layers: a read from outside gets the dequantised weight."""

    def _packed_reader(self, name: str) -> Callable[[nn.Parameter], Tensor] | None:
        m: nn.Module = self  # type: ignore[assignment]
        spec = specs_of(m).get(name)
        if spec is None or spec.adopted:
            return None

        def form() -> Tensor:
            return storage_of(m, name).read(m, name)

        def read(held: nn.Parameter) -> Tensor:
            if torch.compiler.is_compiling():
                return form()
            label = f"{type(m).__name__} {name}"
            return OutsideTensor.of(held, form, label, lambda: stand_in(m, name, held.device))

        return read
