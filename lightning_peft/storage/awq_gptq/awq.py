"""AWQ, version gemm."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_peft.storage.awq_gptq.columns import ColumnsStorage
from lightning_peft.storage.awq_gptq.words import AWQ_ORDER, from_nibbles, nibbles
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import ReleasedWeight

__all__ = ["AWQStorage"]


@register_storage()
class AWQStorage(ColumnsStorage):
    """AWQ, version gemm."""

    label = "awq"
    quant_methods = ("awq",)
    file_names = MappingProxyType({"weight": ["weight", "weight_scale", "weight_zeros"]})
    zero_order = AWQ_ORDER

    def check_config(self, weight: ReleasedWeight, config: Mapping[str, Any]) -> None:
        """Also the version."""
        super().check_config(weight, config)
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(
                f"awq version: expected 'gemm', got {version!r}; its words are in another order: "
                "load the model dequantised"
            )

    def code_words(self, N: int, K: int) -> tuple[int, int]:
        """Eight columns per word."""
        return K, N // 8

    def unpacked(self, words: Tensor) -> Tensor:
        """Codes [K, N]."""
        return nibbles(words, AWQ_ORDER)

    def packed(self, codes: Tensor) -> Tensor:
        """Words [K, N/8]."""
        return from_nibbles(codes, AWQ_ORDER)
