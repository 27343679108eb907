"""Base of AWQ and GPTQ: codes, zero points and scales with the outputs last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout
from torch import Tensor, nn

from lightning_peft.storage.awq_gptq.words import IN_ORDER, from_nibbles, nibbles
from lightning_peft.storage.block_scaled import BlockScaledStorage, BlockSpec
from lightning_peft.storage.fp8 import SCALE_WORDS
from lightning_peft.storage.packed import packed_tensors, specs_of
from lightning_peft.storage.released_format import DeclaredTensor, DeclaredWeight, ReleasedWeight

__all__ = ["ColumnsStorage", "present"]


class ColumnsStorage(BlockScaledStorage, ABC):
    """What AWQ and GPTQ have in common."""

    renamings = (
        (r"\.qweight$", ".weight"),
        (r"\.qzeros$", ".weight_zeros"),
        (r"\.scales$", ".weight_scale"),
        (r"\.g_idx$", ".weight_g_idx"),
    )
    outputs_last = MappingProxyType(
        {
            "weight": "qweight",
            "weight_zeros": "qzeros",
            "weight_scale": "scales",
            "weight_g_idx": "g_idx",
        }
    )
    zero_order: tuple[int, ...] = IN_ORDER
    zero_offset = 0

    @abstractmethod
    def code_words(self, N: int, K: int) -> tuple[int, int]:
        """Shape of the words that hold the codes."""

    @abstractmethod
    def unpacked(self, words: Tensor) -> Tensor:
        """Codes [*, K, N]."""

    @abstractmethod
    def packed(self, codes: Tensor) -> Tensor:
        """Inverse of `unpacked`."""

    def config_for(self, weight: ReleasedWeight) -> Mapping[str, Any] | None:
        """Configuration of one layer; None if it is dense."""
        return weight.config

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """Codes, zero points and scales."""
        config = self.config_for(weight)
        if config is None:
            return None
        self.check_config(weight, config)
        (N, K), name = weight.matrix, weight.name
        group = int(config.get("group_size", 128))
        group = K if group == -1 else group
        scale = weight.dtypes.get("scales", torch.float16)
        lead, groups = weight.experts, -(-K // group)
        tensors = {
            "codes": DeclaredTensor(name, (*lead, *self.code_words(N, K)), torch.int32),
            "scales": DeclaredTensor(f"{name}_scale", (*lead, groups, N), scale),
            "zeros": DeclaredTensor(f"{name}_zeros", (*lead, groups, N // 8), torch.int32),
        }
        return DeclaredWeight(BlockLayout("uint4", 1, group, 1, SCALE_WORDS[scale]), tensors)

    def check_config(self, weight: ReleasedWeight, config: Mapping[str, Any]) -> None:
        """Raise for settings that are not known.

        Raises:
            ValueError: other bits, or a size that words cannot hold.
        """
        label = f"{self.label} {weight.layer!r}"
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise ValueError(
                f"{label}: expected 4 bits, got {bits!r}; load the model with gptqmodel and "
                "dequantise it"
            )
        N, K = weight.matrix
        if N % (8 * weight.halves) or K % 8:
            raise ValueError(
                f"{label}: expected multiples of 8 features, got {list(weight.shape)}; the config "
                "does not belong to this checkpoint"
            )

    def repack(self, m: nn.Module, name: str, keys: Mapping[str, str]) -> dict[str, str]:
        """Words → two codes per byte along the inputs; scales and zero points by rows of W."""
        held = {role: present(m._parameters[key]).detach() for role, key in keys.items()}
        fresh = _on_meta(held) if held["codes"].device.type == "meta" else self._by_rows(held)
        for role, t in fresh.items():
            m._parameters[keys[role]] = nn.Parameter(t, requires_grad=False)
        return {role: keys[role] for role in fresh}

    def _by_rows(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        words, scales = held["codes"], held["scales"]
        *lead, _, N = scales.shape
        K = 8 * words.numel() // torch.Size((*lead, N)).numel()
        codes = torch.empty(*lead, N, K // 2, dtype=torch.uint8, device=words.device)
        for to, of in zip(
            codes.view(-1, N, K // 2), words.view(-1, *words.shape[-2:]), strict=True
        ):
            rows = self.unpacked(of).mT  # one expert at a time: eight bytes per byte of words
            to.copy_(rows[:, 0::2] | (rows[:, 1::2] << 4))
        zeros = (nibbles(held["zeros"], self.zero_order) + self.zero_offset) & 15
        return {
            "codes": codes,
            "scales": scales.mT.contiguous(),
            "zeros": zeros.mT.to(torch.int8).contiguous(),
        }

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """Words under the names of the files; those of experts after the name of the weight."""
        found = super().export(m)
        for name in self.weights(m):
            spec: BlockSpec = specs_of(m)[name]
            for key in spec.keys.values():
                del found[key]
            held = packed_tensors(m, name)
            pairs = held["codes"].detach()
            codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).int()
            zeros = held["zeros"].detach().view(torch.int8).int().mT - self.zero_offset
            scales = held["scales"].detach().view(spec.layout.scale_dtype).mT
            prefix = "" if name == "weight" else f"{name}_"
            found[f"{prefix}qweight"] = self.packed(codes.mT)
            found[f"{prefix}qzeros"] = from_nibbles(zeros & 15, self.zero_order)
            found[f"{prefix}scales"] = scales.contiguous()
        return found


def _on_meta(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the shapes that repacking gives."""
    scales = held["scales"]
    *lead, groups, N = scales.shape
    K = 8 * held["codes"].numel() // torch.Size((*lead, N)).numel()
    shapes = {
        "codes": ((*lead, N, K // 2), torch.uint8),
        "scales": ((*lead, N, groups), scales.dtype),
        "zeros": ((*lead, N, groups), torch.int8),
    }
    return {
        role: torch.empty(shape, dtype=dtype, device="meta")
        for role, (shape, dtype) in shapes.items()
    }


def present(t: Tensor | None) -> Tensor:
    """A declared tensor, which the reader has found."""
    assert t is not None
    return t
