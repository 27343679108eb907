"""FP8 as DeepSeek, Qwen, MiniMax and Mistral release it: e4m3 codes, a scale per block or tensor.

    W[i, j] = q[i, j] · s[i // 128, j // 128]        ``quant_method: "fp8"``

Layers are those of transformers (`FP8Linear`, `FP8Experts`, `FP8GroupedLinear`, `FP8Embedding`), or
the model's own layers filled by `load_packed`. The products are W8A16: activations are not rounded,
also where the checkpoint has static activation scales, so the layer computes what the dequantised
layer computes. gate and up of experts are blocked apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout, ScaleType
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.class_swap import PackedForward
from lightning_peft.core.kernel_backend import backend_scope
from lightning_peft.core.modules import own_tensor
from lightning_peft.storage.block_scaled import BlockScaledStorage, BlockSpec, mro_names
from lightning_peft.storage.linear_forward import recomputed, require_floating
from lightning_peft.storage.packed import packed_tensors, specs_of
from lightning_peft.storage.registry import register_storage, storage_of
from lightning_peft.storage.released_format import (
    DeclaredTensor,
    DeclaredWeight,
    ReleasedWeight,
)

__all__ = [
    "SCALE_WORDS",
    "AdoptedEmbedding",
    "AdoptedGroupedLinear",
    "FP8Storage",
    "scale_word",
    "scales_in_files",
]

_MODULE = "transformers.integrations.finegrained_fp8"
_LINEAR, _EXPERTS, _EMBEDDING, _GROUPED = (
    f"{_MODULE}.{name}" for name in ("FP8Linear", "FP8Experts", "FP8Embedding", "FP8GroupedLinear")
)
_CLASSES = {_LINEAR, _EXPERTS, _EMBEDDING, _GROUPED}
#: Dtype of stored scales → its name in a `BlockLayout`.
SCALE_WORDS: dict[torch.dtype, ScaleType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e8m0fnu: "e8m0",
    torch.uint8: "e8m0",  # the bytes of a power of two
    torch.float8_e4m3fn: "e4m3",
}


def scale_word(label: str, scales: Tensor | None) -> ScaleType:
    """Name of the dtype of scales in a `BlockLayout`.

    Raises:
        ValueError: the scales are missing, or have another dtype.
    """
    if scales is None:
        raise ValueError(
            f"{label}: expected scales beside the codes, found none; load the checkpoint again, "
            "all of its shards"
        )
    word = SCALE_WORDS.get(scales.dtype)
    if word is None:
        raise ValueError(
            f"{label}: expected scales in fp32, bf16, fp16, e8m0 or e4m3, got "
            f"{str(scales.dtype).removeprefix('torch.')}; do not cast the model"
        )
    return word


@register_storage()
class FP8Storage(BlockScaledStorage):
    """e4m3 codes with blocks of any size, or one scale per tensor or half."""

    label = "fp8"
    quant_methods = ("fp8", "mxfp8")
    file_names = MappingProxyType({"weight": ["weight", "weight_scale_inv", "activation_scale"]})
    renamings = (
        (r"^(.+)\.scale$", r"\1.weight_scale_inv"),  # DeepSeek-V4
        (r"\.qscale_weight$", ".weight_scale_inv"),  # Mistral Large
    )

    def skipped(self, config: Mapping[str, Any]) -> Sequence[str] | None:
        """MiniMax calls them ``ignored_layers``."""
        return super().skipped(config) or config.get("ignored_layers")

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """Codes in e4m3, or FP4 experts; scales by block or one per tensor."""
        config, name, experts = weight.config, weight.name, weight.experts
        block = config.get("weight_block_size", (128, 128))
        rows, columns = (0, 0) if block is None else (int(block[0]), int(block[1]))
        power = _one_of(config, "scale_fmt", ("float", "ue8m0"), "float") == "ue8m0"
        static = _one_of(config, "activation_scheme", ("dynamic", "static"), "dynamic") == "static"
        expert = _one_of(config, "expert_dtype", ("fp8", "fp4"), "fp8")
        stored = scales_in_files(weight.dtypes, power)
        if experts and expert == "fp4":
            return None
        layout = BlockLayout("e4m3", rows, columns, weight.halves, SCALE_WORDS[stored])
        grid = self.scales_shape(weight.shape, layout)
        if block is None:
            grid = (*experts, layout.halves) if experts else ()
        scale = "weight_scale_inv" if name == "weight" else f"{name}_scale_inv"
        tensors = {
            "codes": DeclaredTensor(name, tuple(weight.shape), torch.float8_e4m3fn),
            "scales": DeclaredTensor(scale, grid, stored),
        }
        if static and not experts:
            tensors["activation"] = DeclaredTensor("activation_scale", (), torch.float32)
        return DeclaredWeight(layout, tensors)

    def matches(self, m: nn.Module) -> bool:
        """FP8 layers of transformers, whose experts may also be FP4."""
        names = mro_names(m)
        if specs_of(m):
            return self.owns(m, next(iter(specs_of(m)))) and bool(names & _CLASSES)
        if _EXPERTS in names:
            return _tensor(m, "down_proj").dtype != torch.int8
        return bool(names & _CLASSES)

    def adopt(self, m: nn.Module) -> None:
        """Hold codes and scales as bytes."""
        specs = {name: self._arriving(m, name, key) for name, key in _weights(m)}
        for name, spec in specs.items():
            self.hold(m, name, spec)

    def foreign_forward(self, m: nn.Module) -> type[PackedForward] | None:
        """Grouped layers and embeddings have forwards of their own."""
        names = mro_names(m)
        if _GROUPED in names:
            return AdoptedGroupedLinear
        return AdoptedEmbedding if _EMBEDDING in names else None

    def _arriving(self, m: nn.Module, name: str, scale_key: str) -> BlockSpec:
        codes = _tensor(m, name)
        scales = own_tensor(m, scale_key)
        label = f"{self.label} {type(m).__name__}.{name}"
        block: Any = getattr(m, "block_size", None)
        rows, columns = (0, 0) if block is None else (int(block[0]), int(block[1]))
        layout = BlockLayout(
            "e4m3", rows, columns, 2 if name == "gate_up_proj" else 1, scale_word(label, scales)
        )
        keys = {"codes": name, "scales": scale_key}
        activation = _activation_key(name)
        if own_tensor(m, activation) is not None:
            keys["activation"] = activation
        return self.spec(m, name, codes.shape, layout, keys)


def scales_in_files(dtypes: Mapping[str, torch.dtype], power: bool) -> torch.dtype:
    """Dtype to hold scales in, so that reading them rounds nothing.

    Args:
        dtypes: Dtype of the tensors in the files by the last part of their name.
        power: Whether the configuration says that scales are powers of two.
    """
    names = ("weight_scale_inv", "scale", "qscale_weight")
    found = next((dtypes[n] for n in names if n in dtypes), None)
    if power and found in (torch.uint8, torch.float32):  # bytes, or powers of two in fp32
        return found
    return torch.float8_e8m0fnu if power else torch.float32


def _one_of(config: Mapping[str, Any], key: str, known: Sequence[str], default: str) -> str:
    found = config.get(key) or default
    if found not in known:
        raise ValueError(
            f"quantization_config {key}: expected one of {list(known)}, got {found!r}; this "
            "variant is not known: load the model dequantised"
        )
    return str(found)


def _weights(m: nn.Module) -> list[tuple[str, str]]:
    """(name, name of its scales) of each weight of a foreign layer."""
    names = mro_names(m)
    if _EMBEDDING in names:
        return [("weight", "weight_scale")]
    if _EXPERTS in names:
        first = "gate_up_proj" if m._parameters.get("gate_up_proj") is not None else "up_proj"
        return [(n, f"{n}_scale_inv") for n in (first, "down_proj")]
    return [("weight", "weight_scale_inv")]


def _activation_key(name: str) -> str:
    return "activation_scale" if name == "weight" else f"{name}_activation_scale"


def _tensor(m: nn.Module, name: str) -> Tensor:
    found = m._parameters.get(name)
    if found is None:
        raise ValueError(
            f"{type(m).__name__}: expected a parameter {name!r}, found none; load the model again"
        )
    return found


# ---- forwards of layers that are neither plain linear layers nor experts


class AdoptedGroupedLinear(PackedForward):
    """Mixin: a block-diagonal linear layer, [..., groups, in] → [..., groups, out per group]."""

    _swap_prefix = "Adopted"
    n_groups: int  # of transformers' layer

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each group with its rows of the weight, decoded again in backward."""
        require_floating(self, x)
        groups, bias = int(self.n_groups), own_tensor(self, "bias")

        def product(x: Tensor) -> Tensor:
            W = storage_of(self).read(self, "weight", x.dtype)
            y = torch.einsum("...gk,gnk->...gn", x, W.view(groups, -1, W.shape[-1]))
            return y if bias is None else y + bias.view(groups, -1).to(y.dtype)

        with backend_scope(self):
            return recomputed(product, x)


class AdoptedEmbedding(PackedForward):
    """Mixin: an embedding whose rows are decoded when they are looked up."""

    _swap_prefix = "Adopted"

    def forward(self, ids: Tensor) -> Tensor:
        """Codes of the rows, times the scale of the table."""
        spec: BlockSpec = specs_of(self)["weight"]
        held = packed_tensors(self, "weight")
        codes = F.embedding(ids, held["codes"])
        scale = held["scales"].view(spec.layout.scale_dtype)
        rows = codes.view(torch.float8_e4m3fn).to(torch.float32) * scale.float().reshape(())
        return rows.to(spec.dtype)
