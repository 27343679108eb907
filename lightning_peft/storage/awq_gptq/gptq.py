"""GPTQ, with groups of neighbouring inputs or in the order of ``desc_act``.

    W[n, k] = (q[k, n] - z[g_idx[k], n]) · s[g_idx[k], n]

With ``desc_act``, the columns of W are held sorted by their group, so that a group is a block of
neighbours again. A product takes its inputs in this order.
"""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.storage.awq_gptq.columns import ColumnsStorage, present
from lightning_peft.storage.awq_gptq.words import IN_ORDER, from_nibbles, nibbles
from lightning_peft.storage.block_scaled import BlockSpec
from lightning_peft.storage.packed import from_bytes, packed_tensors, specs_of
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import DeclaredTensor, DeclaredWeight, ReleasedWeight

__all__ = ["GPTQ2Storage", "GPTQStorage"]


class _GPTQ(ColumnsStorage, ABC):
    """Base of both versions."""

    quant_methods = ("gptq",)
    file_names = MappingProxyType(
        {"weight": ["weight", "weight_scale", "weight_zeros", "weight_g_idx"]}
    )
    _formats: tuple[str, ...] = ()

    def reads(self, config: Mapping[str, Any]) -> bool:
        """This storage's checkpoint format."""
        return super().reads(config) and config.get("checkpoint_format", "gptq") in self._formats

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """Also the group of each input."""
        declared = super().declare(weight)
        if declared is None:
            return None
        inputs = weight.halves * weight.matrix[1] if weight.experts else weight.matrix[1]
        indices = DeclaredTensor(f"{weight.name}_g_idx", (*weight.experts, inputs), torch.int32)
        # With desc_act, groups may still be in order; files decide that, a plan counts the order.
        role = "order" if weight.config.get("desc_act") else "indices"
        return DeclaredWeight(declared.layout, {**declared.tensors, role: indices})

    def config_for(self, weight: ReleasedWeight) -> Mapping[str, Any] | None:
        """Configuration of one layer: GPTQModel lists exceptions by pattern."""
        for pattern, changes in (weight.config.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), weight.layer):
                dense = pattern.startswith("-:") or changes is False
                return None if dense else {**weight.config, **changes}
        return weight.config

    def code_words(self, N: int, K: int) -> tuple[int, int]:
        """Eight inputs per word."""
        return K // 8, N

    def unpacked(self, words: Tensor) -> Tensor:
        """Codes [K, N]."""
        return nibbles(words.mT, IN_ORDER).mT

    def packed(self, codes: Tensor) -> Tensor:
        """Words [K/8, N]."""
        return from_nibbles(codes.mT, IN_ORDER).mT.contiguous()

    # ---- the order of inputs

    def repack(self, m: nn.Module, name: str, keys: Mapping[str, str]) -> dict[str, str]:
        """Sort the inputs by their group; the order is held unless it is that of the layer."""
        rest = {role: key for role, key in keys.items() if role not in ("indices", "order")}
        key = keys.get("order") or keys["indices"]
        if present(m._parameters[key]).device.type == "meta" and "order" in keys:
            return {**super().repack(m, name, rest), "order": key}
        indices = present(m._parameters.pop(key)).detach()
        if indices.device.type == "meta":
            return super().repack(m, name, rest)
        scales, codes = (present(m._parameters[keys[role]]) for role in ("scales", "codes"))
        K = 8 * codes.shape[-2]
        order = self._order(indices.reshape(-1, K).long(), scales.shape[-2])
        if order is None:
            return super().repack(m, name, rest)
        if codes.ndim > 2:
            raise ValueError(
                f"{self.label} {name}: expected experts with groups of neighbouring inputs, got a "
                "g_idx in another order (desc_act); load the model dequantised and give "
                "quantization='nf4'"
            )
        sorted_codes = self.unpacked(codes.detach())[order]
        m._parameters[keys["codes"]] = nn.Parameter(self.packed(sorted_codes), requires_grad=False)
        held = super().repack(m, name, rest)
        m._parameters[key] = nn.Parameter(order.int(), requires_grad=False)
        return {**held, "order": key}

    def _order(self, indices: Tensor, groups: int) -> Tensor | None:
        """Inputs sorted by group; None if they lie so already.

        Args:
            indices: Group of each input, [matrices, K].
            groups: Number of groups.

        Raises:
            ValueError: groups of another size.
        """
        K = indices.shape[-1]
        expected = torch.arange(K, device=indices.device) // (K // groups)
        if bool((indices == expected).all()):
            return None
        found = indices.sort(dim=-1, stable=True)
        if not bool((found.values == expected).all()):
            raise ValueError(
                f"{self.label} g_idx: expected {groups} groups of {K // groups} inputs each, got "
                f"groups {int(indices.min())} to {int(indices.max())} of other sizes; the file is "
                "damaged: download it again"
            )
        return found.indices[0]

    def linear(self, m: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the inputs in the order of the groups."""
        order = self._held_order(m, name)
        inputs = x if order is None else x.index_select(-1, order)
        return super().linear(m, name, inputs, bias)

    def decode(self, tensors: Mapping[str, Tensor], spec: BlockSpec, dtype: torch.dtype) -> Tensor:
        """The canonical weight."""
        W = super().decode(tensors, spec, dtype)
        order = tensors.get("order")
        return W if order is None else W[..., order.argsort()]

    def write(self, m: nn.Module, name: str, W: Tensor) -> None:
        """Encode with the inputs in the order of the groups."""
        order, spec = self._held_order(m, name), specs_of(m)[name]
        super().write(m, name, W if order is None else spec.natural(spec.canonical(W)[..., order]))

    def quantization_roundtrip(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """Decode(encode(W))."""
        order, spec = self._held_order(m, name), specs_of(m)[name]
        if order is None:
            return super().quantization_roundtrip(m, name, W)
        ordered = spec.natural(spec.canonical(W)[..., order])
        stored = spec.canonical(super().quantization_roundtrip(m, name, ordered))
        restored: Tensor = spec.natural(stored[..., order.argsort()])
        return restored

    def _held_order(self, m: nn.Module, name: str) -> Tensor | None:
        spec: BlockSpec = specs_of(m)[name]
        if "order" not in spec.keys:
            return None
        return from_bytes(packed_tensors(m, name)["order"].detach(), spec.formats["order"])

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """Also the group of each input."""
        found = super().export(m)
        for name in self.weights(m):
            spec: BlockSpec = specs_of(m)[name]
            prefix = "" if name == "weight" else f"{name}_"
            scales = found[f"{prefix}scales"]
            K = spec.matrix[1]
            indices = torch.arange(K, device=scales.device, dtype=torch.int32)
            indices = indices // (K // scales.shape[-2])
            order = self._held_order(m, name)
            if order is not None:
                found[f"{prefix}qweight"] = self.packed(
                    self.unpacked(found[f"{prefix}qweight"])[order.argsort()]
                )
                indices = indices[order.argsort()]
            if len(spec.shape) > 2:
                halves = 2 if name == "gate_up_proj" else 1
                indices = indices.repeat(spec.shape[0], halves)
            found[f"{prefix}g_idx"] = indices
        return found


@register_storage()
class GPTQStorage(_GPTQ):
    """Zero points stored less one."""

    label = "gptq"
    _formats = ("gptq",)
    zero_offset = 1


@register_storage()
class GPTQ2Storage(_GPTQ):
    """Zero points stored as they are."""

    label = "gptq_v2"
    _formats = ("gptq_v2",)
