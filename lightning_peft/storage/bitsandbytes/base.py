"""What the storages of bitsandbytes' layers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning_peft_kernels.experts.grouped_linear import Groups, grouped_linear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.protocols import Reason
from lightning_peft.storage.base import BaseStorage
from lightning_peft.storage.bitsandbytes.layers import bnb_class_name
from lightning_peft.storage.linear_forward import recomputed

__all__ = ["BnbStorage", "hold_dense"]


class BnbStorage(BaseStorage, ABC):
    """What layers of bitsandbytes have in common: one weight, and scales outside the module."""

    is_quantized = True
    lossless_write = False
    classes: tuple[str, ...] = ()

    def weights(self, m: nn.Module) -> Sequence[str]:
        """``weight`` of this storage's classes."""
        return ("weight",) if bnb_class_name(type(m)) in self.classes else ()

    @abstractmethod
    def shape(self, m: nn.Module, name: str) -> torch.Size:
        """[out, in]."""

    def numel(self, m: nn.Module, name: str) -> int:
        """Logical elements."""
        return self.shape(m, name).numel()

    @abstractmethod
    def read(
        self,
        m: nn.Module,
        name: str,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """Dequantised."""

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the dequantised weight, which backward dequantises again."""
        return recomputed(lambda x: F.linear(x, self.read(m, name, x.dtype), bias), x)

    def grouped_linear(self, m: nn.Module, name: str, X: Tensor, groups: Groups) -> Tensor:
        """Layers of bitsandbytes hold one matrix, never experts."""
        return grouped_linear(X, self.read(m, name, X.dtype), groups)

    def can_shard(self, m: nn.Module) -> Literal[True] | Reason:
        """No: the scales are outside the module's parameters."""
        return Reason(
            "bitsandbytes holds scales that FSDP2 cannot see; load the base dense, or use "
            "strategy='peft_ddp'"
        )


def hold_dense(m: nn.Module, W: Tensor) -> Callable[[], None]:
    """Make the layer a plain `nn.Linear` with this weight; return the undo."""
    undo = _HoldAgain(m, type(m), m._parameters["weight"])
    m.__class__ = nn.Linear
    m._parameters["weight"] = nn.Parameter(W.contiguous(), requires_grad=False)
    return undo


@dataclass
class _HoldAgain:
    """Undoes `hold_dense`; a deep copy of the module takes its own copy along."""

    module: nn.Module
    cls: type[nn.Module]
    packed: nn.Parameter | None

    def __call__(self) -> None:
        """Put the class and the packed parameter back."""
        self.module.__class__ = self.cls
        self.module._parameters["weight"] = self.packed
