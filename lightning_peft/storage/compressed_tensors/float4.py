"""NVFP4 and MXFP4 of compressed-tensors: two e2m1 codes per byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors, ScaleType
from torch import Tensor

from lightning_peft.storage.block_scaled import BlockSpec
from lightning_peft.storage.compressed_tensors.base import CompressedStorage
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import (
    DeclaredTensor,
    DeclaredWeight,
    ReleasedWeight,
)

__all__ = ["CompressedFloat4Storage"]


@register_storage()
class CompressedFloat4Storage(CompressedStorage):
    """Groups of 32 have powers of two for scales; others e4m3, and a global scale."""

    label = "fp4 (compressed-tensors)"
    codes_suffix = "_packed"
    allows_zero_scales = True

    def takes(self, weights: Mapping[str, Any]) -> bool:
        """4-bit floating point."""
        return weights.get("num_bits") == 4 and weights.get("type") == "float"

    def declare_in_group(
        self, weight: ReleasedWeight, weights: Mapping[str, Any]
    ) -> DeclaredWeight:
        """Codes, scales, and the global scale of NVFP4."""
        (N, K), experts, name = weight.matrix, weight.experts, weight.name
        group = int(weights.get("group_size") or 16)
        is_mx = group == 32
        word: ScaleType = "e8m0" if is_mx else "e4m3"
        stored = torch.uint8 if is_mx else torch.float8_e4m3fn
        grid = (*experts, N, -(-K // group))
        tensors = {
            "codes": DeclaredTensor(name, (*experts, N, K // 2), torch.uint8),
            "scales": DeclaredTensor(f"{name}_scale", grid, stored),
        }
        if not is_mx:
            outer = (*experts, weight.halves) if experts else (1,)
            tensors["outer"] = DeclaredTensor(f"{name}_global_scale", outer, torch.float32)
        return DeclaredWeight(BlockLayout("e2m1", 1, group, 1, word), tensors)

    def _form(self, held: Mapping[str, Tensor], spec: BlockSpec) -> BlockTensors:
        """The global scale divides."""
        q = super()._form(held, spec)
        return q if q.outer is None else q._replace(outer=q.outer.reciprocal())
