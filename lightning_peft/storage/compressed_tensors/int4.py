"""int4 of compressed-tensors: codes and zero points in int32 words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.storage.block_scaled import BlockSpec
from lightning_peft.storage.compressed_tensors.base import ScaledCodesStorage
from lightning_peft.storage.compressed_tensors.config_groups import block_of
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import DeclaredTensor, ReleasedWeight

__all__ = ["CompressedInt4Storage"]


@register_storage()
class CompressedInt4Storage(ScaledCodesStorage):
    """One scale per group of columns, with or without zero points."""

    label = "int4"
    codes_suffix = "_packed"
    element = "int4"
    codes_dtype = torch.int32

    def takes(self, weights: Mapping[str, Any]) -> bool:
        """4-bit integers."""
        return weights.get("num_bits") == 4 and weights.get("type", "int") == "int"

    def codes_shape(self, shape: torch.Size, layout: BlockLayout) -> tuple[int, ...]:
        """Words of eight columns."""
        *lead, N, K = shape
        return (*lead, N, -(-K // 8))

    def companions(
        self, weight: ReleasedWeight, weights: Mapping[str, Any]
    ) -> dict[str, DeclaredTensor]:
        """The shape, and zero points of an asymmetric group."""
        (N, K), halves = weight.matrix, weight.halves
        size = (*weight.experts, 2 * halves) if weight.experts else (2,)
        stored = weight.dtypes.get("weight_shape", torch.int64)
        found = {"shape": DeclaredTensor(f"{weight.name}_shape", size, stored)}
        if not weights.get("symmetric", True):
            _, columns = block_of(weights)
            words = halves * -(-(N // halves) // 8)
            grid = (*weight.experts, words, -(-K // (columns or K)))
            found["zeros"] = DeclaredTensor(f"{weight.name}_zero_point", grid, torch.int32)
        return found

    def _form(self, held: Mapping[str, Tensor], spec: BlockSpec) -> BlockTensors:
        """Zero points lie eight rows to a word, 8 added."""
        zeros = held.get("zeros")
        q = super()._form({r: t for r, t in held.items() if r != "zeros"}, spec)
        if zeros is None:
            return q
        N = spec.matrix[0]
        words = zeros.view(torch.int32)
        nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-2)
        rows = nibbles.flatten(-3, -2)[..., :N, :]
        return q._replace(zeros=(rows - 8).to(torch.int8))

    def _encode(self, M: Tensor, spec: BlockSpec, outer: Tensor | None) -> BlockTensors:
        """With zero points, codes and zero points are nibbles from 0 to 15."""
        layout = spec.layout
        if "zeros" in spec.formats:
            layout = layout._replace(element="uint4")
        return encode_blocks(M, layout, outer)

    def _typed(self, q: BlockTensors, spec: BlockSpec) -> dict[str, Tensor]:
        """Codes by words of eight columns, zero points by words of eight rows."""
        bytes_per_row = spec.formats["codes"].shape[-1] * 4
        missing = bytes_per_row - q.codes.shape[-1]
        codes = F.pad(q.codes, (0, missing)).contiguous()
        found = super()._typed(q._replace(codes=codes, zeros=None), spec)
        if q.zeros is not None:
            rows = F.pad(q.zeros.int(), (0, 0, 0, -q.zeros.shape[-2] % 8)).unflatten(-2, (-1, 8))
            shifts = 4 * torch.arange(8, device=rows.device, dtype=torch.int32)
            found["zeros"] = (rows << shifts[:, None]).sum(-2, dtype=torch.int32)
        return found
