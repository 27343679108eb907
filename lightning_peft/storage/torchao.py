"""torchao: int8 and float8 weights, in a model that arrives quantised or in its files.

    Int8Tensor    W = (qdata - zero_point) · scale
    Float8Tensor  W = qdata · scale

A scale covers a row, a group of columns, a block, or the tensor. torchao holds a weight as a tensor
subclass: `adopt` takes it apart without a copy, and `release` puts it together again. Products are
W8A16, also where torchao quantises activations. Files hold the parts as ``_weight_qdata``,
``_weight_scale`` and ``_weight_zero_point``, experts already stacked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors, Element
from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.storage.block_scaled import BlockScaledStorage, BlockSpec, DeclaredWeight
from lightning_peft.storage.fp8 import SCALE_WORDS, scale_word
from lightning_peft.storage.packed import specs_of
from lightning_peft.storage.registry import register_storage

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


class _TorchAo(BlockScaledStorage):
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
    configs: tuple[str, ...] = ()

    # ---- files

    def declare(
        self,
        label: str,
        weight: str,
        shape: torch.Size,
        config: Mapping[str, Any],
        dtypes: Mapping[str, torch.dtype],
    ) -> DeclaredWeight | None:
        """Codes and scales, for int8 also zero points."""
        found = _config_of(label, weight, config)
        if found is None or found.get("_type") not in self.configs:
            return None
        data: Mapping[str, Any] = found.get("_data") or {}
        kind = _named(data.get("weight_dtype"))
        if kind not in (None, str(self.codes_dtype).removeprefix("torch.")):
            raise ValueError(
                f"torchao {label!r} weight_dtype: expected {self.codes_dtype}, got {kind}; load "
                'the model dense and give quantization="nf4"'
            )
        *lead, N, K = shape
        rows, columns = _block(label, data, len(lead))
        scale = dtypes.get(f"_{weight}_scale", torch.float32)
        layout = BlockLayout(self.element, rows, columns, 1, SCALE_WORDS[scale])
        grid = (*lead, *layout.grid(N, K))
        tensors = {
            "codes": (weight, tuple(shape), self.codes_dtype),
            "scales": (f"{weight}_scale", grid, scale),
        }
        if self.element == "int8" and (not dtypes or f"_{weight}_zero_point" in dtypes):
            tensors["zeros"] = (f"{weight}_zero_point", grid, torch.int8)
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
        keys = {}
        for part in sorted(parts, key=lambda p: list(_ROLES).index(p) if p in _ROLES else 9):
            key = name if part == "qdata" else f"{name}_{part}"
            t: Tensor = getattr(weight, part)
            m._parameters[key] = nn.Parameter(t.detach(), requires_grad=False)
            keys[_ROLES.get(part, part)] = key
        plain = self.spec(m, name, weight.shape, layout, keys)
        plain.metadata = _description(weight)
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
    configs = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")

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
    configs = ("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig")


_KNOWN = (*TorchAoInt8Storage.configs, *TorchAoFloat8Storage.configs)


# ---- torchao's own descriptions


def _description(weight: Tensor) -> str:
    """What the metadata of a file says of a tensor; "" without torchao's encoder."""
    try:
        from torchao.prototype.safetensors.safetensors_utils import (
            TensorSubclassAttributeJSONEncoder,
        )
    except ImportError:
        return ""
    return json.dumps(weight, cls=TensorSubclassAttributeJSONEncoder)


def _config_of(label: str, weight: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of one weight; None if it is dense.

    Raises:
        ValueError: a configuration whose weights are not known.
    """
    kind = config.get("quant_type")
    chosen = kind.get("default") if isinstance(kind, Mapping) else None
    if not isinstance(chosen, Mapping):
        raise ValueError(
            f"torchao quant_type: expected a configuration of torchao 0.15 or later, got {kind!r}; "
            'load the model dense and give quantization="nf4"'
        )
    found: Any = chosen
    if chosen.get("_type") in ("FqnToConfig", "ModuleFqnToConfig"):
        data: Mapping[str, Any] = chosen.get("_data") or {}
        listed = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
        found = _listed(label, weight, listed)
    elif weight != "weight":
        return None  # a configuration for all layers means linear layers
    if found is None:
        return None
    if found.get("_type") not in _KNOWN:
        raise ValueError(
            f"torchao {label!r}: expected one of {list(_KNOWN)}, got {found.get('_type')!r}, whose "
            "weights are not known; load the model dense and give quantization=\"nf4\""
        )
    return cast("Mapping[str, Any]", found)


def _listed(label: str, weight: str, listed: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Entry of a table of names, in torchao's order: names, patterns, then the default."""
    full = join(label, weight)
    for name in (full, label):
        if name in listed:
            return cast("Mapping[str, Any] | None", listed[name])
    for pattern, entry in listed.items():
        if not pattern.startswith("re:"):
            continue
        if any(re.fullmatch(pattern[3:], name) for name in (full, label)):
            return cast("Mapping[str, Any] | None", entry)
    return listed.get("_default") if weight == "weight" else None


def _named(value: Any) -> Any:
    """Name of a dtype in a configuration."""
    return value.get("_data") if isinstance(value, Mapping) else value


def _block(label: str, data: Mapping[str, Any], lead: int) -> tuple[int, int]:
    """Rows and columns that share a scale; 0 means all.

    Raises:
        ValueError: another granularity.
    """
    found: Any = data.get("granularity") or {"_type": "PerRow"}
    if isinstance(found, list):  # of activations and of weights
        found = found[-1]
    kind, values = found.get("_type"), found.get("_data") or {}
    if data.get("group_size"):
        return 1, int(data["group_size"])
    if kind == "PerRow" and values.get("dim", -1) in (-1, 1 + lead):
        return 1, 0
    if kind == "PerGroup":
        return 1, int(values["group_size"])
    if kind == "PerTensor" and not lead:
        return 0, 0
    raise ValueError(
        f"torchao {label!r} granularity: expected a scale per row, group of columns or matrix, got "
        f"{found!r}; load the model dense and give quantization=\"nf4\""
    )


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
