"""MXFP4: two e2m1 codes per byte, low nibble first, and one power of two for 32 inputs.

    W[i, j] = FP4[code[i, j]] · 2^(s[i, j // 32] - 127)

So are the experts of gpt-oss (``quant_method: "mxfp4"``) and of DeepSeek-V4 (an FP8 checkpoint with
``expert_dtype: "fp4"``). On a GPU, transformers keeps the bytes of gpt-oss in the layout of its
kernels, outside of parameters. `adopt` undoes that layout, one projection at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from lightning_peft_kernels.block_scaled.layout import BlockLayout
from torch import Tensor, nn

from lightning_peft.storage.block_scaled import BlockScaledStorage, BlockSpec, mro_names
from lightning_peft.storage.fp8 import SCALE_WORDS, scale_word, scales_in_files
from lightning_peft.storage.packed import specs_of
from lightning_peft.storage.registry import register_storage
from lightning_peft.storage.released_format import (
    DeclaredTensor,
    DeclaredWeight,
    ReleasedWeight,
)

__all__ = ["InterleavedGate", "Mxfp4Storage"]

_GPT_OSS = "transformers.integrations.mxfp4.Mxfp4GptOssExperts"
_FP8_EXPERTS = "transformers.integrations.finegrained_fp8.FP8Experts"
_GROUP = 32
_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "_is_hooked")


@dataclass(frozen=True)
class InterleavedGate:
    """The gate of gpt-oss: (up + 1) · gate · σ(1.702 · gate), clamped, gate and up interleaved.

    Attributes:
        limit: Largest magnitude of gate and up.
        alpha: Factor inside the sigmoid.
    """

    limit: float
    alpha: float

    def __call__(self, gate_up: Tensor) -> Tensor:
        """[..., 2 · inner] → [..., inner]."""
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


@register_storage()
class Mxfp4Storage(BlockScaledStorage):
    """FP4 experts with a power of two per 32 inputs."""

    label = "mxfp4"
    quant_methods = ("mxfp4",)
    file_names = MappingProxyType({"gate_up_proj": ["gate_up_proj"], "down_proj": ["down_proj"]})
    renamings = (
        (r"gate_up_proj_blocks$", "gate_up_proj"),
        (r"down_proj_blocks$", "down_proj"),
    )

    def reads(self, config: Mapping[str, Any]) -> bool:
        """MXFP4, and FP8 checkpoints whose experts are FP4."""
        return super().reads(config) or _has_fp4_experts(config)

    def declare(self, weight: ReleasedWeight) -> DeclaredWeight | None:
        """Experts; all other layers are dense, or FP8."""
        if not weight.experts:
            return None
        name, (N, K) = weight.name, weight.matrix
        if K % _GROUP:
            raise ValueError(
                f"{weight.layer} {name}: expected a multiple of {_GROUP} inputs, got {K}; MXFP4 "
                "has no partial groups: the config does not belong to this checkpoint"
            )
        lead = (*weight.experts, N)
        grid = (*lead, K // _GROUP)
        if _has_fp4_experts(weight.config):
            power = weight.config.get("scale_fmt") == "ue8m0"
            stored = scales_in_files(weight.dtypes, power)
            word = SCALE_WORDS[stored]
            codes = DeclaredTensor(name, (*lead, K // 2), torch.int8)
            scales = DeclaredTensor(f"{name}_scale_inv", grid, stored)
        else:
            word = "e8m0"
            codes = DeclaredTensor(name, (*grid, _GROUP // 2), torch.uint8)
            scales = DeclaredTensor(f"{name}_scales", grid, torch.uint8)
        layout = BlockLayout("e2m1", 1, _GROUP, 1, word)
        return DeclaredWeight(layout, {"codes": codes, "scales": scales})

    def _code_rows(self, codes: Tensor, shape: torch.Size) -> Tensor:
        """gpt-oss has an axis of the 16 bytes of a group."""
        return codes.flatten(-2) if codes.ndim == len(shape) + 1 else codes

    def matches(self, m: nn.Module) -> bool:
        """Experts of gpt-oss on a GPU, and FP4 experts of DeepSeek-V4."""
        names = mro_names(m)
        if specs_of(m):
            return self.owns(m, "down_proj") and bool(names & {_GPT_OSS, _FP8_EXPERTS})
        down = m._parameters.get("down_proj")
        if _GPT_OSS in names:  # once they were loaded
            return vars(m).get("down_proj_precision_config") is not None
        return _FP8_EXPERTS in names and down is not None and down.dtype == torch.int8

    def adopt(self, m: nn.Module) -> None:
        """Hold codes and scales as bytes."""
        if _GPT_OSS in mro_names(m):
            _to_plain_bytes(m)
        try:
            specs = {name: self._arriving(m, name) for name in _names(m)}
        except ValueError:
            if _GPT_OSS in mro_names(m):
                _to_kernel_layout(m)
            raise
        for name, spec in specs.items():
            self.hold(m, name, spec)

    def _arriving(self, m: nn.Module, name: str) -> BlockSpec:
        codes = m.get_parameter(name)
        gpt_oss = _GPT_OSS in mro_names(m)
        key = f"{name}_scales" if gpt_oss else f"{name}_scale_inv"
        label = f"{self.label} {type(m).__name__}.{name}"
        word = scale_word(label, m._parameters.get(key))
        E, N, *rest = codes.shape
        K = 2 * torch.Size(rest).numel()
        layout = BlockLayout("e2m1", 1, _GROUP, 1, word)
        keys = {"codes": name, "scales": key}
        return self.spec(m, name, torch.Size((E, N, K)), layout, keys, transposed=gpt_oss)

    def release(self, m: nn.Module) -> None:
        """Also put gpt-oss' bytes back into the layout of transformers' kernels."""
        super().release(m)
        if _GPT_OSS in mro_names(m):
            _to_kernel_layout(m)

    def export(self, m: nn.Module) -> dict[str, Tensor]:
        """gpt-oss calls the codes ``blocks``: [E, out, in / 32, 16]."""
        found = super().export(m)
        for name in self.weights(m):
            spec: BlockSpec = specs_of(m)[name]
            if spec.keys["scales"] == f"{name}_scales":
                codes = found.pop(name).view(torch.uint8)
                found[f"{name}_blocks"] = codes.reshape(*spec.shape[:-1], -1, _GROUP // 2)
        return found


def _has_fp4_experts(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "fp8" and config.get("expert_dtype") == "fp4"


def _names(m: nn.Module) -> list[str]:
    first = "gate_up_proj" if m._parameters.get("gate_up_proj") is not None else "up_proj"
    return [first, "down_proj"]


# ---- gpt-oss as transformers holds it on a GPU


def _to_plain_bytes(m: Any) -> None:
    """Make codes and scales parameters, a projection at a time, and drop the kernels' tensors."""
    for proj in ("gate_up_proj", "down_proj"):
        held = vars(m).pop(proj)
        scales = getattr(m, f"{proj}_precision_config").weight_scale
        for key, t in ((proj, held), (f"{proj}_scales", scales)):
            plain = t.storage.layout.unswizzle_data(t.storage.data).mT.contiguous()
            m._parameters[key] = nn.Parameter(plain.view(torch.uint8), requires_grad=False)
        setattr(m, f"{proj}_precision_config", None)
    m.has_gate, m.has_bias, m.is_transposed = True, True, True
    m._apply_gate = InterleavedGate(float(m.limit), float(m.alpha))
    m._is_hooked = True  # the layer around it calls the model's router, then these experts


def _to_kernel_layout(m: Any) -> None:
    from transformers.integrations import mxfp4

    hub = vars(mxfp4)["triton_kernels_hub"]
    for proj in ("gate_up_proj", "down_proj"):
        blocks, scales = m._parameters.pop(proj), m._parameters.pop(f"{proj}_scales")
        mxfp4.swizzle_mxfp4_convertops(blocks.data, scales.data, m, proj, blocks.device, hub)
    for mark in _MARKS:
        vars(m).pop(mark, None)
