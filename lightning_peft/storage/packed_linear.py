"""Linear layers whose weight a storage holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.core.class_swap import PackedForward
from lightning_peft.core.kernel_backend import backend_scope
from lightning_peft.core.modules import own_tensor
from lightning_peft.storage.linear_forward import (
    plain_forward,
    recomputed,
    require_floating,
    weight_in_place,
)
from lightning_peft.storage.outside_reads import PackedReads
from lightning_peft.storage.registry import storage_of

__all__ = ["AdoptedLinear", "PackedLinear"]


class AdoptedLinear(PackedForward):
    """Mixin: a linear layer of another library, whose own forward is replaced."""

    _swap_prefix = "Adopted"

    def forward(self, x: Tensor) -> Tensor:
        """`x Wᵀ + bias` by the storage that holds the weight."""
        require_floating(self, x)
        with backend_scope(self):
            return storage_of(self).linear(self, "weight", x, own_tensor(self, "bias"))


class PackedLinear(PackedReads, PackedForward):
    """Mixin: a linear layer whose weight was quantised."""

    _swap_prefix = "Packed"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x Wᵀ + bias`; a subclass with a forward of its own reads the dequantised weight."""
        require_floating(self, x)
        storage, forward = storage_of(self), super().forward

        def product(x: Tensor) -> Tensor:
            W = storage.read(self, "weight", x.dtype)
            with weight_in_place(self, W):
                y: Tensor = forward(x, *args, **kwargs)
            return y

        with backend_scope(self):
            if plain_forward(self):
                return storage.linear(self, "weight", x, own_tensor(self, "bias"))
            return recomputed(product, x)
