"""compressed-tensors: int4, int8, FP8, NVFP4 and MXFP4 as llm-compressor and Kimi-K2 write them.

    int4   weight_packed int32 [N, ⌈K/8⌉], eight columns per word, first in the low bits; 8 added
    int8   weight int8 [N, K]
    FP8    weight e4m3 [N, K]
    NVFP4  weight_packed uint8 [N, K/2], scales e4m3, divided by weight_global_scale
    MXFP4  weight_packed uint8 [N, K/2], scales uint8: powers of two

``weight_scale`` covers a group of columns, a row, a block, or the tensor. The library's own layers
decompress for good in their first forward, and transformers decompresses experts when it loads
them. `load_packed` fills the model's own layers instead, experts included.
"""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors, Element, ScaleType
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.storage.block_scaled import BlockScaledStorage, BlockSpec, DeclaredWeight
from lightning_peft.storage.fp8 import SCALE_WORDS
from lightning_peft.storage.registry import register_storage

__all__ = [
    "CompressedFP8Storage",
    "CompressedFloat4Storage",
    "CompressedInt4Storage",
    "CompressedInt8Storage",
    "file_names_of",
    "matches_pattern",
]

_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
_KNOWN = (*_PACKED, "int-quantized", "naive-quantized", "float-quantized")


class _Compressed(BlockScaledStorage, ABC):
    """Base of the formats of compressed-tensors."""

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

    def reads(self, config: Mapping[str, Any]) -> bool:
        """A configuration one of whose groups has this storage's codes."""
        if not super().reads(config):
            return False
        groups: Mapping[str, Any] = config.get("config_groups") or {}
        return any(self._takes(g.get("weights") or {}) for g in groups.values())

    @abstractmethod
    def _takes(self, weights: Mapping[str, Any]) -> bool:
        """Whether this storage holds weights of a group described so."""

    def skipped(self, config: Mapping[str, Any]) -> Sequence[str] | None:
        """None of transformers' patterns: `declare` reads the library's own list."""
        return []

    def declare(
        self,
        label: str,
        weight: str,
        shape: torch.Size,
        config: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> DeclaredWeight | None:
        """The tensors of the first group whose targets have this layer."""
        names = file_names_of(label, weight, shape)
        if any(
            matches_pattern(n, pattern) for n in names for pattern in config.get("ignore") or ()
        ):
            return None
        for group in (config.get("config_groups") or {}).values():
            weights = group.get("weights")
            if weights and self._takes(weights) and _is_target(names, group.get("targets") or ()):
                _check_group(config, group, weights)
                return self._tensors(weight, shape, weights, dtypes)
        return None

    def _tensors(
        self,
        weight: str,
        shape: torch.Size,
        weights: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> DeclaredWeight:
        stack = len(shape) > 2
        scale = dtypes.get("weight_scale", torch.bfloat16)
        rows, columns = _block(weights)
        halves = 2 if weight == "gate_up_proj" and rows != 1 else 1
        layout = BlockLayout(self._element(), rows, columns, halves, SCALE_WORDS[scale])
        grid = self.scales_shape(shape, layout)
        if not rows and not columns:  # one scale per tensor, [1], or [experts, 1 or 2]
            grid = (shape[0], layout.halves) if stack else (1,)
        tensors = {
            "codes": (weight, self.codes_shape(shape, layout), self._codes_dtype()),
            "scales": (f"{weight}_scale", grid, layout.scale_dtype),
        }
        return DeclaredWeight(layout, tensors | self._further(weight, shape, weights, dtypes))

    def _element(self) -> Element:
        """Return the format of one code."""
        raise NotImplementedError  # a format that replaces `_tensors` needs none

    def _codes_dtype(self) -> torch.dtype:
        """Return the dtype of the codes in the file."""
        raise NotImplementedError  # a format that replaces `_tensors` needs none

    def _further(
        self,
        weight: str,
        shape: torch.Size,
        weights: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
        return {}


@register_storage()
class CompressedInt8Storage(_Compressed):
    """int8 codes, one scale per row, group or tensor."""

    label = "int8 (compressed-tensors)"

    def _takes(self, weights: Mapping[str, Any]) -> bool:
        return weights.get("num_bits") == 8 and weights.get("type", "int") == "int"

    def _element(self) -> Element:
        return "int8"

    def _codes_dtype(self) -> torch.dtype:
        return torch.int8


@register_storage()
class CompressedFP8Storage(_Compressed):
    """e4m3 codes, one scale per row, block or tensor."""

    label = "fp8 (compressed-tensors)"

    def _takes(self, weights: Mapping[str, Any]) -> bool:
        return weights.get("num_bits") == 8 and weights.get("type") == "float"

    def _element(self) -> Element:
        return "e4m3"

    def _codes_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn


@register_storage()
class CompressedInt4Storage(_Compressed):
    """int4 codes in int32 words, one scale per group of columns, with or without zero points."""

    label = "int4"
    codes_suffix = "_packed"

    def _takes(self, weights: Mapping[str, Any]) -> bool:
        return weights.get("num_bits") == 4 and weights.get("type", "int") == "int"

    def _element(self) -> Element:
        return "int4"

    def _codes_dtype(self) -> torch.dtype:
        return torch.int32

    def codes_shape(self, shape: torch.Size, layout: BlockLayout) -> tuple[int, ...]:
        """Words of eight columns."""
        *lead, N, K = shape
        return (*lead, N, -(-K // 8))

    def _further(
        self,
        weight: str,
        shape: torch.Size,
        weights: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
        *lead, N, K = shape
        halves = 2 if weight == "gate_up_proj" else 1
        size = (*lead, 2 * halves) if lead else (2,)
        found = {"shape": (f"{weight}_shape", size, dtypes.get("weight_shape", torch.int64))}
        if not weights.get("symmetric", True):
            _, columns = _block(weights)
            words = halves * -(-(N // halves) // 8)
            grid = (*lead, words, -(-K // (columns or K)))
            found["zeros"] = (f"{weight}_zero_point", grid, torch.int32)
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

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """The codes are called ``weight_packed``."""
        return _packed_names(self, m, super().export(m))


@register_storage()
class CompressedFloat4Storage(_Compressed):
    """NVFP4 and MXFP4."""

    label = "fp4 (compressed-tensors)"
    codes_suffix = "_packed"
    allows_zero_scales = True

    def _takes(self, weights: Mapping[str, Any]) -> bool:
        return weights.get("num_bits") == 4 and weights.get("type") == "float"

    def _tensors(
        self,
        weight: str,
        shape: torch.Size,
        weights: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> DeclaredWeight:
        *lead, N, K = shape
        group = int(weights.get("group_size") or 16)
        word: ScaleType = "e8m0" if group == 32 else "e4m3"
        stored = torch.uint8 if group == 32 else torch.float8_e4m3fn
        layout = BlockLayout("e2m1", 1, group, 1, word)
        tensors: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {
            "codes": (weight, (*lead, N, K // 2), torch.uint8),
            "scales": (f"{weight}_scale", (*lead, N, -(-K // group)), stored),
        }
        if group != 32:
            halves = 2 if weight == "gate_up_proj" else 1
            outer = (*lead, halves) if lead else (1,)
            tensors["outer"] = (f"{weight}_global_scale", outer, torch.float32)
        return DeclaredWeight(layout, tensors)

    def _form(self, held: Mapping[str, Tensor], spec: BlockSpec) -> BlockTensors:
        """The global scale divides."""
        q = super()._form(held, spec)
        return q if q.outer is None else q._replace(outer=q.outer.reciprocal())

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """The codes are called ``weight_packed``."""
        return _packed_names(self, m, super().export(m))


def _packed_names(
    storage: BlockScaledStorage, m: nn.Module, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Codes by their name in files."""
    for name in storage.weights(m):
        found[f"{name}{storage.codes_suffix}"] = found.pop(name)
    return found


def file_names_of(label: str, weight: str, shape: torch.Size) -> list[str]:
    """Names of the linear layers that hold a weight in the files."""
    if len(shape) < 3:
        return [label]
    leaf = "down_proj" if weight == "down_proj" else "gate_proj"
    return [f"{label}.0.{leaf}"]


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether an entry of ``ignore`` or ``targets`` means this layer."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatch(name, pattern)


def _is_target(names: Sequence[str], targets: Sequence[str]) -> bool:
    return any(t == "Linear" or matches_pattern(n, t) for t in targets for n in names)


def _check_group(
    config: Mapping[str, Any], group: Mapping[str, Any], weights: Mapping[str, Any]
) -> None:
    """Raise if the group has a setting whose tensors are not known.

    Raises:
        ValueError: with the setting.
    """
    form = group.get("format") or config.get("format")
    sparse = (config.get("sparsity_config") or {}).get("format", "dense")
    actorder = weights.get("actorder")
    for what, found, known in (
        ("format", form, _KNOWN),
        ("sparsity_config format", sparse, ("dense",)),
        ("actorder", actorder, (None, "static", "weight")),
        ("strategy", weights.get("strategy"), ("group", "channel", "tensor", "block",
         "tensor_group")),
    ):  # fmt: skip
        if found not in known:
            raise ValueError(
                f"compressed-tensors {what}: expected one of {list(known)}, got {found!r}; load "
                "the model dequantised (CompressedTensorsConfig(dequantize=True))"
            )


def _block(weights: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale; 0 means all."""
    strategy = weights.get("strategy")
    if strategy == "tensor":
        return 0, 0
    if strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
        return int(rows), int(columns)
    return 1, int(weights.get("group_size") or 0) if strategy == "group" else 0
