"""NVFP4 and FP8 as NVIDIA's Model Optimizer exports them (``quant_method: "modelopt"``).

    NVFP4  W[i, j] = FP4[code[i, j]] · weight_scale[i, j // 16] · weight_scale_2
    FP8    W[i, j] = e4m3[code[i, j]] · weight_scale

Scales of activations (``input_scale``) are kept for linear layers and not used: products are W4A16
and W8A16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout

from lightning_peft.storage.block_scaled import BlockScaledStorage
from lightning_peft.storage.layer_patterns import is_listed
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import (
    DeclaredTensor,
    DeclaredWeight,
    ReleasedWeight,
)

__all__ = ["ModelOptFP8Storage", "NVFP4Storage"]


class _ModelOpt(BlockScaledStorage, ABC):
    """What the formats of Model Optimizer have in common."""

    quant_methods = ("modelopt",)
    file_names = MappingProxyType(
        {"weight": ["weight", "weight_scale", "weight_scale_2", "input_scale"]}
    )
    #: ``quant_algo`` of the configurations.
    algorithms: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _layout(self, weight: ReleasedWeight) -> BlockLayout:
        """Meaning of the codes of one weight."""

    @abstractmethod
    def _tensors(self, weight: ReleasedWeight) -> dict[str, DeclaredTensor]:
        """Codes and scales of one weight."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        """A configuration with one of these algorithms."""
        return super().reads(config) and config.get("quant_algo") in self.algorithms

    def skipped(self, config: Mapping[str, Any]) -> Sequence[str] | None:
        """None of transformers' patterns: `declare` reads the library's own list."""
        return []

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """Codes and scales; of a linear layer, also the scale of its inputs."""
        config = weight.config
        if is_listed(weight, config.get("ignore") or config.get("exclude_modules") or ()):
            return None
        tensors = self._tensors(weight)
        if not weight.experts and "input_scale" in weight.dtypes:
            tensors["activation"] = DeclaredTensor("input_scale", (), torch.float32)
        return DeclaredWeight(self._layout(weight), tensors)


def _per_matrix(weight: ReleasedWeight) -> tuple[int, ...]:
    """Shape of a scale per matrix: gate and up of an expert have one each."""
    return (*weight.experts, weight.halves) if weight.experts else ()


@register_storage()
class NVFP4Storage(_ModelOpt):
    """e2m1 codes, e4m3 scales of 16 inputs, one fp32 scale per matrix."""

    label = "nvfp4"
    algorithms = ("NVFP4", "W4A16_NVFP4")
    allows_zero_scales = True

    def _layout(self, weight: ReleasedWeight) -> BlockLayout:
        return BlockLayout("e2m1", 1, 16, 1, "e4m3")

    def _tensors(self, weight: ReleasedWeight) -> dict[str, DeclaredTensor]:
        (N, K), experts, name = weight.matrix, weight.experts, weight.name
        grid = (*experts, N, -(-K // 16))
        return {
            "codes": DeclaredTensor(name, (*experts, N, K // 2), torch.uint8),
            "scales": DeclaredTensor(f"{name}_scale", grid, torch.float8_e4m3fn),
            "outer": DeclaredTensor(f"{name}_scale_2", _per_matrix(weight), torch.float32),
        }


@register_storage()
class ModelOptFP8Storage(_ModelOpt):
    """e4m3 codes with one scale per matrix."""

    label = "fp8 (modelopt)"
    algorithms = ("FP8",)

    def _layout(self, weight: ReleasedWeight) -> BlockLayout:
        return BlockLayout("e4m3", 0, 0, weight.halves, "float32")

    def _tensors(self, weight: ReleasedWeight) -> dict[str, DeclaredTensor]:
        name = weight.name
        return {
            "codes": DeclaredTensor(name, tuple(weight.shape), torch.float8_e4m3fn),
            "scales": DeclaredTensor(f"{name}_scale", _per_matrix(weight), torch.float32),
        }
