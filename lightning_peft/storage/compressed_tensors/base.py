"""Bases of the formats of compressed-tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout, Element
from torch import Tensor, nn

from lightning_peft.storage.block_scaled import BlockScaledStorage
from lightning_peft.storage.compressed_tensors.config_groups import (
    block_of,
    check_group,
    groups_of,
    has_target,
)
from lightning_peft.storage.fp8 import SCALE_WORDS
from lightning_peft.storage.layer_patterns import is_listed
from lightning_peft.storage.released_format import (
    DeclaredTensor,
    DeclaredWeight,
    ReleasedWeight,
)

__all__ = ["CompressedStorage", "ScaledCodesStorage"]


class CompressedStorage(BlockScaledStorage, ABC):
    """A format of compressed-tensors: the weights of those groups that `takes` says."""

    quant_methods = ("compressed-tensors",)
    renamings = ((r"\.weight_packed$", ".weight"),)
    file_names = MappingProxyType(
        {
            "weight": [
                "weight", "weight_scale", "weight_shape", "weight_zero_point",
                "weight_global_scale", "input_scale", "input_global_scale",
            ]
        }
    )  # fmt: skip

    @abstractmethod
    def takes(self, weights: Mapping[str, Any]) -> bool:
        """Whether this storage holds weights of a group with these settings."""

    @abstractmethod
    def declare_in_group(
        self, weight: ReleasedWeight, weights: Mapping[str, Any]
    ) -> DeclaredWeight:
        """The tensors of one weight in a group with these settings."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        """A configuration one of whose groups has this storage's codes."""
        return super().reads(config) and any(self.takes(w) for _, w in groups_of(config))

    def skipped(self, config: Mapping[str, Any]) -> Sequence[str] | None:
        """None of transformers' patterns: `declare` reads the library's own list."""
        return []

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """The tensors in the first group whose targets have this layer."""
        config = weight.config
        if is_listed(weight, config.get("ignore") or ()):
            return None
        for group, weights in groups_of(config):
            if self.takes(weights) and has_target(group, weight):
                check_group(config, group, weights)
                return self.declare_in_group(weight, weights)
        return None

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """Codes by their name in files."""
        found = super().export(m)
        for name in self.weights(m):
            found[f"{name}{self.codes_suffix}"] = found.pop(name)
        return found


class ScaledCodesStorage(CompressedStorage, ABC):
    """A format whose scales cover a group of columns, a row, a block, or the tensor."""

    #: Format of one code.
    element: ClassVar[Element]
    #: Dtype of the codes in files.
    codes_dtype: ClassVar[torch.dtype]

    def declare_in_group(
        self, weight: ReleasedWeight, weights: Mapping[str, Any]
    ) -> DeclaredWeight:
        """Codes and scales, and what `companions` adds."""
        rows, columns = block_of(weights)
        scale = weight.dtypes.get("weight_scale", torch.bfloat16)
        halves = weight.halves if rows != 1 else 1
        layout = BlockLayout(self.element, rows, columns, halves, SCALE_WORDS[scale])
        grid = self.scales_shape(weight.shape, layout)
        if not rows and not columns:  # one scale per tensor, [1], or [experts, 1 or 2]
            grid = (*weight.experts, layout.halves) if weight.experts else (1,)
        codes = self.codes_shape(weight.shape, layout)
        tensors = {
            "codes": DeclaredTensor(weight.name, codes, self.codes_dtype),
            "scales": DeclaredTensor(f"{weight.name}_scale", grid, layout.scale_dtype),
        }
        return DeclaredWeight(layout, tensors | self.companions(weight, weights))

    def companions(
        self, weight: ReleasedWeight, weights: Mapping[str, Any]
    ) -> dict[str, DeclaredTensor]:
        """Tensors besides codes and scales."""
        return {}
