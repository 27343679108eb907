"""A storage from outside the package: int8 by rows, made by `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.storage import QuantizedStorage, StorageConfig, register_storage
from lightning_peft.storage.packed import QuantizedWeightSpec

__all__ = ["ToyInt8", "ToyInt8Storage"]


@dataclass(frozen=True)
class ToyInt8(StorageConfig):
    """One fp32 scale per row.

    Attributes:
        exclude_modules: Suffixes of layers that stay dense.
    """

    exclude_modules: list[str] | None = None


@register_storage(ToyInt8)
class ToyInt8Storage(QuantizedStorage):
    """W = codes · scale of the row."""

    label = "toy int8"

    def accepts(self, config: Any) -> bool:
        return True

    def bits_per_weight(self, shape: torch.Size, config: ToyInt8) -> float:
        return 8.0 + 32.0 / shape[-1]

    def encode(self, M: Tensor, spec: QuantizedWeightSpec) -> dict[str, Tensor]:
        scales = M.float().abs().amax(-1).clamp(min=1e-30) / 127
        codes = (M.float() / scales.unsqueeze(-1)).round().to(torch.int8)
        return {"codes": codes, "scales": scales}

    def decode(
        self, tensors: Mapping[str, Tensor], spec: QuantizedWeightSpec, dtype: torch.dtype
    ) -> Tensor:
        return (tensors["codes"].float() * tensors["scales"].unsqueeze(-1)).to(dtype)
