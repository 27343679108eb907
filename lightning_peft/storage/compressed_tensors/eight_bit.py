"""int8 and FP8 of compressed-tensors: one code per byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_peft.storage.compressed_tensors.base import ScaledCodesStorage
from lightning_peft.storage.registry import register_storage

__all__ = ["CompressedFP8Storage", "CompressedInt8Storage"]


@register_storage()
class CompressedInt8Storage(ScaledCodesStorage):
    """int8 codes, one scale per row, group or tensor."""

    label = "int8 (compressed-tensors)"
    element = "int8"
    codes_dtype = torch.int8

    def takes(self, weights: Mapping[str, Any]) -> bool:
        """8-bit integers."""
        return weights.get("num_bits") == 8 and weights.get("type", "int") == "int"


@register_storage()
class CompressedFP8Storage(ScaledCodesStorage):
    """e4m3 codes, one scale per row, block or tensor."""

    label = "fp8 (compressed-tensors)"
    element = "e4m3"
    codes_dtype = torch.float8_e4m3fn

    def takes(self, weights: Mapping[str, Any]) -> bool:
        """8-bit floating point."""
        return weights.get("num_bits") == 8 and weights.get("type") == "float"
