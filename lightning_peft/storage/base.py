"""Defaults of a storage that neither quantises nor adopts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import PackedForward
from lightning_peft.core.protocols import Reason, WeightLayout

__all__ = ["BaseStorage"]


class BaseStorage:
    """Common defaults of all storages."""

    label: str = ""
    quantizes_meta: bool = True
    exports: bool = False

    def weights(self, m: nn.Module) -> Sequence[str]:
        """No weights."""
        return ()

    def owns(self, m: nn.Module, name: str) -> bool:
        """Whether `name` is among `weights`."""
        return name in self.weights(m)

    def accepts(self, config: Any) -> bool:
        """No configuration."""
        return False

    def require_available(self) -> None:
        """Nothing besides torch is needed."""

    def bits_per_weight(self, shape: torch.Size, config: Any) -> float:
        """Only a storage with a configuration is planned for."""
        raise TypeError(f"{self.label}: expected a storage that quantises, got one that does not")

    def dense_reason(self, m: nn.Module, layout: WeightLayout, config: Any) -> str:
        """Every layer is taken."""
        return ""

    def quantize(self, m: nn.Module, layout: WeightLayout, config: Any) -> None:
        """Only a storage with a configuration quantises."""
        raise TypeError(f"{self.label}: expected a storage that quantises, got one that does not")

    def matches(self, m: nn.Module) -> bool:
        """No foreign class."""
        return False

    def adopt(self, m: nn.Module) -> None:
        """Only a storage with `matches` adopts."""
        raise TypeError(f"{self.label}: expected a storage that adopts, got one that does not")

    def release(self, m: nn.Module) -> None:
        """Only a storage with `matches` releases."""
        raise TypeError(f"{self.label}: expected a storage that adopts, got one that does not")

    def foreign_forward(self, m: nn.Module) -> type[PackedForward] | None:
        """The forward that the kind of layer has for its weights."""
        return None

    def set_compute_dtype(self, m: nn.Module, dtype: torch.dtype) -> None:
        """The layers of this format remember their dtype."""

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """The module's own tensors, adapters left out."""
        found = {**m._parameters, **m._buffers}
        return {key: t.detach() for key, t in found.items() if t is not None}

    def product_kernel(self, m: nn.Module, name: str) -> str:
        """No kernel of the storage's own."""
        return ""

    def can_shard(self, m: nn.Module) -> Literal[True] | Reason:
        """All tensors may be cut by rows."""
        return True
