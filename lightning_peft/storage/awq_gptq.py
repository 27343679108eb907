"""AWQ and GPTQ: int4 codes of a transposed weight in int32 words, with zero points per group.

    W[n, k] = (q[k, n] - z[k // group, n]) · s[k // group, n]

    AWQ    qweight [K, N/8]: nibble i of word j is column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    GPTQ   qweight [K/8, N]: nibble i of word j is input 8 j + i; qzeros [K / group, N/8] in order.
           Format "gptq" stores z - 1, "gptq_v2" stores z.

After loading, codes are held by rows of W, two per byte; `export` writes the words again. Nothing
of gptqmodel is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout
from torch import Tensor, nn

from lightning_peft.storage.block_scaled import BlockScaledStorage, BlockSpec
from lightning_peft.storage.fp8 import SCALE_WORDS
from lightning_peft.storage.packed import packed_tensors, specs_of
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import (
    DeclaredTensor,
    DeclaredWeight,
    ReleasedWeight,
)

__all__ = ["AWQStorage", "GPTQStorage"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_IN_ORDER = tuple(range(8))


class _ColumnsStorage(BlockScaledStorage, ABC):
    """What AWQ and GPTQ have in common."""

    renamings = (
        (r"\.qweight$", ".weight"),
        (r"\.qzeros$", ".weight_zeros"),
        (r"\.scales$", ".weight_scale"),
        (r"\.g_idx$", ".weight_g_idx"),
    )

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """Codes, zero points and scales of a linear layer."""
        self._check_config(weight)
        N, K = weight.matrix
        group = int(weight.config.get("group_size", 128))
        group = K if group == -1 else group
        scale = weight.dtypes.get("scales", torch.float16)
        groups = -(-K // group)
        tensors = {
            "codes": DeclaredTensor("weight", self._code_words(N, K), torch.int32),
            "scales": DeclaredTensor("weight_scale", (groups, N), scale),
            "zeros": DeclaredTensor("weight_zeros", (groups, N // 8), torch.int32),
        }
        if self._has_indices:
            tensors["indices"] = DeclaredTensor("weight_g_idx", (K,), torch.int32)
        return DeclaredWeight(BlockLayout("uint4", 1, group, 1, SCALE_WORDS[scale]), tensors)

    _has_indices = False
    _zero_order: tuple[int, ...] = _IN_ORDER
    _zero_offset = 0

    @abstractmethod
    def _code_words(self, N: int, K: int) -> tuple[int, int]:
        """Shape of the words that hold the codes."""

    @abstractmethod
    def _unpacked(self, words: Tensor) -> Tensor:
        """Codes [K, N]."""

    @abstractmethod
    def _words(self, codes: Tensor) -> Tensor:
        """Inverse of `_unpacked`."""

    def _check_config(self, weight: ReleasedWeight) -> None:
        label = f"{self.label} {weight.layer!r}"
        bits = weight.config.get("bits", weight.config.get("w_bit", 4))
        if bits != 4:
            raise ValueError(
                f"{self.label}: expected 4 bits, got {bits!r}; load the model with gptqmodel and "
                "dequantise it"
            )
        if weight.experts:
            raise ValueError(
                f"{label}: expected linear layers, got fused experts, whose words transformers "
                "cannot merge; load the model dequantised and give quantization='nf4'"
            )
        if weight.shape[0] % 8 or weight.shape[1] % 8:
            raise ValueError(
                f"{label}: expected multiples of 8 features, got {list(weight.shape)}; the config "
                "does not belong to this checkpoint"
            )

    def repack(self, m: nn.Module, name: str, keys: Mapping[str, str]) -> dict[str, str]:
        """Words → two codes per byte along the inputs; scales and zero points by rows of W."""
        held = {role: m._parameters[key] for role, key in keys.items()}
        if all(t is not None and t.device.type == "meta" for t in held.values()):
            return self._repack_meta(m, keys)
        K = self._unpacked(_present(held["codes"])).shape[0]
        scales = _present(held["scales"]).detach()
        group = K // scales.shape[0]
        if self._has_indices:
            self._check_indices(_present(held["indices"]), group)
            del m._parameters[keys["indices"]]
        codes = self._unpacked(_present(held["codes"]).detach()).mT
        zeros = _nibbles(_present(held["zeros"]).detach(), self._zero_order) + self._zero_offset
        fresh = {
            "codes": (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8),
            "scales": scales.mT,
            "zeros": (zeros & 15 if self._zero_offset else zeros).mT.to(torch.int8),
        }
        for role, t in fresh.items():
            m._parameters[keys[role]] = nn.Parameter(t.contiguous(), requires_grad=False)
        return {role: keys[role] for role in fresh}

    def _repack_meta(self, m: nn.Module, keys: Mapping[str, str]) -> dict[str, str]:
        """The shapes of `repack`."""
        groups, N = _present(m._parameters[keys["scales"]]).shape
        scales = _present(m._parameters[keys["scales"]]).dtype
        K = 8 * _present(m._parameters[keys["codes"]]).numel() // N
        if self._has_indices:
            del m._parameters[keys["indices"]]
        shapes = {
            "codes": ((N, K // 2), torch.uint8),
            "scales": ((N, groups), scales),
            "zeros": ((N, groups), torch.int8),
        }
        for role, (shape, dtype) in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            m._parameters[keys[role]] = nn.Parameter(empty, requires_grad=False)
        return {role: keys[role] for role in shapes}

    def _check_indices(self, indices: Tensor, group: int) -> None:
        expected = torch.arange(indices.numel(), device=indices.device) // group
        if not torch.equal(indices.long(), expected):
            raise ValueError(
                f"{self.label}: expected groups of neighbouring inputs, got a g_idx in another "
                "order (desc_act); load the model dequantised and give quantization='nf4'"
            )

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """Words under the names of the files."""
        found = super().export(m)
        for name in self.weights(m):
            spec: BlockSpec = specs_of(m)[name]
            for key in spec.keys.values():
                del found[key]
            held = packed_tensors(m, name)
            pairs = held["codes"].detach()
            codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).int()
            zeros = held["zeros"].detach().view(torch.int8).int().mT - self._zero_offset
            scales = held["scales"].detach().view(spec.layout.scale_dtype).mT
            found["qweight"] = self._words(codes.mT)
            found["qzeros"] = _from_nibbles(zeros & 15, self._zero_order)
            found["scales"] = scales.contiguous()
            if self._has_indices:
                K = spec.shape[-1]
                group = K // scales.shape[0]
                found["g_idx"] = torch.arange(K, device=scales.device, dtype=torch.int32) // group
        return found


@register_storage()
class AWQStorage(_ColumnsStorage):
    """AWQ, version gemm."""

    label = "awq"
    quant_methods = ("awq",)
    _zero_order = _AWQ_ORDER

    def _check_config(self, weight: ReleasedWeight) -> None:
        super()._check_config(weight)
        version = str(weight.config.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(
                f"awq version: expected 'gemm', got {version!r}; its words are in another order: "
                "load the model dequantised"
            )

    def _code_words(self, N: int, K: int) -> tuple[int, int]:
        return K, N // 8

    def _unpacked(self, words: Tensor) -> Tensor:
        return _nibbles(words, _AWQ_ORDER)

    def _words(self, codes: Tensor) -> Tensor:
        return _from_nibbles(codes, _AWQ_ORDER)


class _GPTQ(_ColumnsStorage, ABC):
    """GPTQ with groups in order."""

    quant_methods = ("gptq",)
    _has_indices = True
    _formats: tuple[str, ...] = ()

    def reads(self, config: Mapping[str, Any]) -> bool:
        """This storage's checkpoint format."""
        return super().reads(config) and config.get("checkpoint_format", "gptq") in self._formats

    def _code_words(self, N: int, K: int) -> tuple[int, int]:
        return K // 8, N

    def _unpacked(self, words: Tensor) -> Tensor:
        return _nibbles(words.mT, _IN_ORDER).mT

    def _words(self, codes: Tensor) -> Tensor:
        return _from_nibbles(codes.mT, _IN_ORDER).mT.contiguous()


@register_storage()
class GPTQStorage(_GPTQ):
    """Zero points stored less one."""

    label = "gptq"
    _formats = ("gptq",)
    _zero_offset = 1


@register_storage()
class GPTQ2Storage(_GPTQ):
    """Zero points stored as they are."""

    label = "gptq_v2"
    _formats = ("gptq_v2",)


def _nibbles(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """[..., n] int32 → [..., 8 n], nibble i of a word at place ``order[i]``."""
    each = torch.stack([(words >> (4 * order.index(i))) & 15 for i in range(8)], dim=-1)
    return each.flatten(-2)


def _from_nibbles(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Inverse of `_nibbles`."""
    each = values.int().unflatten(-1, (-1, 8))
    shifts = torch.tensor([4 * order.index(i) for i in range(8)], device=values.device)
    words: Tensor = (each << shifts.int()).sum(-1, dtype=torch.int32)
    return words


def _present(t: nn.Parameter | None) -> Tensor:
    assert t is not None  # declared, and the reader found it
    return t
