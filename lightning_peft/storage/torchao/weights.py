"""Weights of torchao: tensor subclasses in a model, and their parts in files.

`adopt` takes a tensor apart without a copy, and `release` puts it together again. Files hold the
parts as ``_weight_qdata``, ``_weight_scale`` and ``_weight_zero_point``, experts already stacked.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors, Element
from torch import Tensor, nn

from lightning_peft.storage.block_scaled import BlockScaledStorage, BlockSpec
from lightning_peft.storage.fp8 import SCALE_WORDS, scale_word
from lightning_peft.storage.packed import specs_of
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import (
    DeclaredTensor,
    DeclaredWeight,
    ReleasedWeight,
)
from lightning_peft.storage.torchao.config import FLOAT8_CONFIGS, INT8_CONFIGS, config_of
from lightning_peft.storage.torchao.description import described

__all__ = ["TorchAoFloat8Storage", "TorchAoInt8Storage"]

#: Part of a tensor subclass → role.
_ROLES = {"qdata": "codes", "scale": "scales", "zero_point": "zeros"}


@dataclass
class TorchAoSpec(BlockSpec):
    """Also what puts torchao's tensor together again.

    Attributes:
        tensor_class: Class of the tensor; None for a weight that came from a file.
        attributes: What ``__tensor_flatten__`` returned beside the names of the parts.
        requires_grad: Flag of the parameter.
    """

    tensor_class: Any = None
    attributes: Any = field(default=None)
    requires_grad: bool = False


class _TorchAo(BlockScaledStorage, ABC):
    """What both formats have in common."""

    quant_methods = ("torchao",)
    renamings = tuple(
        (rf"\._{name}_{part}$", f".{name}" + ("" if part == "qdata" else f"_{part}"))
        for name in ("weight", "gate_up_proj", "down_proj")
        for part in ("qdata", "scale", "zero_point")
    )
    tensor_class = ""
    element: Element
    codes_dtype: torch.dtype
    #: Configurations of torchao that make these weights.
    configs: tuple[str, ...]

    # ---- files

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """Codes and scales, for int8 also zero points."""
        config = config_of(weight)
        if config is None or config.kind not in self.configs:
            return None
        config.require_dtype(weight, self.codes_dtype)
        rows, columns = config.block(weight)
        scale = weight.dtypes.get(f"_{weight.name}_scale", torch.float32)
        layout = BlockLayout(self.element, rows, columns, 1, SCALE_WORDS[scale])
        grid = (*weight.experts, *layout.grid(*weight.matrix))
        tensors = {
            "codes": DeclaredTensor(weight.name, tuple(weight.shape), self.codes_dtype),
            "scales": DeclaredTensor(f"{weight.name}_scale", grid, scale),
        }
        has_zeros = not weight.dtypes or f"_{weight.name}_zero_point" in weight.dtypes
        if self.element == "int8" and has_zeros:
            tensors["zeros"] = DeclaredTensor(f"{weight.name}_zero_point", grid, torch.int8)
        return DeclaredWeight(layout, tensors)

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """The parts by their names in files."""
        found = super().export(m)
        for name in self.weights(m):
            spec: BlockSpec = specs_of(m)[name]
            parts = {role: part for part, role in _ROLES.items()}
            for role, key in spec.keys.items():
                found[f"_{name}_{parts.get(role, role)}"] = found.pop(key)
        return found

    # ---- tensors of torchao

    def matches(self, m: nn.Module) -> bool:
        """A module with a weight of this tensor class."""
        specs = specs_of(m)
        if specs:
            return any(isinstance(s, TorchAoSpec) and s.kind == self.label for s in specs.values())
        return any(self._is_mine(p) for p in m._parameters.values())

    def _is_mine(self, p: Tensor | None) -> bool:
        cls = type(p)
        return cls.__name__ == self.tensor_class and cls.__module__.startswith("torchao.")

    def adopt(self, m: nn.Module) -> None:
        """Hold the parts as bytes."""
        before = dict(m._parameters)
        names = [name for name, p in before.items() if self._is_mine(p)]
        try:
            specs = {name: self._arriving(m, name) for name in names}
        except ValueError:
            m._parameters.clear()
            m._parameters.update(before)
            raise
        for name, spec in specs.items():
            self.hold(m, name, spec)

    def _arriving(self, m: nn.Module, name: str) -> TorchAoSpec:
        """Replace a tensor by its parts.

        Raises:
            ValueError: a scale of the input, or a layout that is not known.
        """
        weight: Any = m._parameters[name]
        label = f"{self.label} {type(m).__name__}.{name}"
        parts, attributes = weight.__tensor_flatten__()
        if "act_pre_scale" in parts:
            raise ValueError(
                f"{label}: expected a weight alone, got one whose input is scaled (act_pre_scale); "
                'load the model dense and give quantization="nf4"'
            )
        if weight.ndim > 2 and getattr(m, "is_transposed", False):
            raise ValueError(
                f"{label}: expected experts [experts, out, in], got [experts, in, out]; load the "
                'model dense and give quantization="nf4"'
            )
        scale: Tensor = weight.scale
        rows, columns = _block_of(label, weight.shape, scale)
        layout = BlockLayout(self.element, rows, columns, 1, scale_word(label, scale))
        if "zero_point" in parts and weight.zero_point.shape != scale.shape:
            raise ValueError(
                f"{label}: expected a zero point per scale, got shapes "
                f"{list(weight.zero_point.shape)} and {list(scale.shape)}; quantise the model again"
            )
        keys = {}
        for part in sorted(parts, key=lambda p: list(_ROLES).index(p) if p in _ROLES else 9):
            key = name if part == "qdata" else f"{name}_{part}"
            t: Tensor = getattr(weight, part)
            m._parameters[key] = nn.Parameter(t.detach(), requires_grad=False)
            keys[_ROLES.get(part, part)] = key
        plain = self.spec(m, name, weight.shape, layout, keys)
        plain.metadata = described(type(weight).__name__, attributes, parts)
        own = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return TorchAoSpec(
            **own,
            tensor_class=type(weight),
            attributes=attributes,
            requires_grad=weight.requires_grad,
        )

    def release(self, m: nn.Module) -> None:
        """Put torchao's tensors together again."""
        specs = {name: cast("TorchAoSpec", specs_of(m)[name]) for name in self.weights(m)}
        super().release(m)
        by_role = {role: part for part, role in _ROLES.items()}
        for name, spec in specs.items():
            parts = {}
            for role, key in spec.keys.items():
                p = m._parameters[key] if key == name else m._parameters.pop(key)
                assert p is not None  # held until now
                parts[by_role.get(role, role)] = p.data
            made = spec.tensor_class.__tensor_unflatten__(parts, spec.attributes, None, None)
            m._parameters[name] = nn.Parameter(made, requires_grad=spec.requires_grad)


@register_storage()
class TorchAoInt8Storage(_TorchAo):
    """Int8Tensor: int8 codes, with or without zero points."""

    label = "int8 (torchao)"
    tensor_class = "Int8Tensor"
    element = "int8"
    codes_dtype = torch.int8
    configs = INT8_CONFIGS

    def _typed(self, q: BlockTensors, spec: BlockSpec) -> dict[str, Tensor]:
        """Codes are written symmetric, so zero points become 0."""
        found = super()._typed(q._replace(zeros=None), spec)
        form = spec.formats.get("zeros")
        if form is not None:
            found["zeros"] = torch.zeros(form.shape, dtype=form.dtype, device=q.codes.device)
        return found


@register_storage()
class TorchAoFloat8Storage(_TorchAo):
    """Float8Tensor: e4m3 codes."""

    label = "fp8 (torchao)"
    tensor_class = "Float8Tensor"
    element = "e4m3"
    codes_dtype = torch.float8_e4m3fn
    configs = FLOAT8_CONFIGS


def _block_of(label: str, shape: torch.Size, scale: Tensor) -> tuple[int, int]:
    """Rows and columns that share a scale of a tensor.

    Raises:
        ValueError: the scales do not divide the weight into equal blocks, or span experts.
    """
    *lead, N, K = shape
    if not lead and scale.numel() == 1:
        return 0, 0
    same = scale.ndim == len(shape) and list(scale.shape[:-2]) == lead
    if not same or N % scale.shape[-2] or K % scale.shape[-1]:
        raise ValueError(
            f"{label}: expected scales that divide {list(shape)} into equal blocks, got "
            f'{list(scale.shape)}; load the model dense and give quantization="nf4"'
        )
    return N // scale.shape[-2], K // scale.shape[-1]
