"""NVFP4 and FP8 as NVIDIA's Model Optimizer exports them (``quant_method: "modelopt"``).

    NVFP4  W[i, j] = FP4[code[i, j]] · weight_scale[i, j // 16] · weight_scale_2
    FP8    W[i, j] = e4m3[code[i, j]] · weight_scale

Scales of activations (``input_scale``) are kept for linear layers and not used: products are W4A16
and W8A16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout

from lightning_peft.storage.block_scaled import BlockScaledStorage, DeclaredWeight
from lightning_peft.storage.compressed_tensors import file_names_of, matches_pattern
from lightning_peft.storage.registry import register_storage

__all__ = ["ModelOptFP8Storage", "NVFP4Storage"]


class _ModelOpt(BlockScaledStorage):
    """What the formats of Model Optimizer have in common."""

    quant_methods = ("modelopt",)
    file_names = MappingProxyType(
        {"weight": ["weight", "weight_scale", "weight_scale_2", "input_scale"]}
    )
    algorithm = ""

    def reads(self, config: Mapping[str, Any]) -> bool:
        """A configuration with this algorithm."""
        algorithm = config.get("quant_algo") or (config.get("quantization") or {}).get("quant_algo")
        return super().reads(config) and algorithm == self.algorithm

    def skipped(self, config: Mapping[str, Any]) -> Sequence[str] | None:
        """None of transformers' patterns: `declare` reads the library's own list."""
        return []

    def _is_dense(
        self, label: str, weight: str, shape: torch.Size, config: Mapping[str, Any]
    ) -> bool:
        listed = config.get("ignore") or config.get("exclude_modules") or ()
        names = file_names_of(label, weight, shape)
        return any(matches_pattern(n, pattern) for n in names for pattern in listed)


@register_storage()
class NVFP4Storage(_ModelOpt):
    """e2m1 codes, e4m3 scales of 16 inputs, one fp32 scale per matrix."""

    label = "nvfp4"
    algorithm = "NVFP4"
    allows_zero_scales = True

    def declare(
        self,
        label: str,
        weight: str,
        shape: torch.Size,
        config: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> DeclaredWeight | None:
        """Codes and both scales."""
        if self._is_dense(label, weight, shape, config):
            return None
        *lead, N, K = shape
        halves = 2 if weight == "gate_up_proj" else 1
        outer = (*lead, halves) if lead else ()
        tensors: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {
            "codes": (weight, (*lead, N, K // 2), torch.uint8),
            "scales": (f"{weight}_scale", (*lead, N, -(-K // 16)), torch.float8_e4m3fn),
            "outer": (f"{weight}_scale_2", outer, torch.float32),
        }
        if not lead and "input_scale" in dtypes:
            tensors["activation"] = ("input_scale", (), torch.float32)
        return DeclaredWeight(BlockLayout("e2m1", 1, 16, 1, "e4m3"), tensors)


@register_storage()
class ModelOptFP8Storage(_ModelOpt):
    """e4m3 codes with one scale per matrix."""

    label = "fp8 (modelopt)"
    algorithm = "FP8"

    def declare(
        self,
        label: str,
        weight: str,
        shape: torch.Size,
        config: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> DeclaredWeight | None:
        """Codes and their scale."""
        if self._is_dense(label, weight, shape, config):
            return None
        *lead, _, _ = shape
        halves = 2 if weight == "gate_up_proj" else 1
        tensors: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {
            "codes": (weight, tuple(shape), torch.float8_e4m3fn),
            "scales": (f"{weight}_scale", (*lead, halves) if lead else (), torch.float32),
        }
        if not lead and "input_scale" in dtypes:
            tensors["activation"] = ("input_scale", (), torch.float32)
        return DeclaredWeight(BlockLayout("e4m3", 0, 0, halves, "float32"), tensors)
