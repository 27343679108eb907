"""Tiny checkpoints in released formats, packed by code of the tests under the released names.

`write(name, folder)` makes ``folder/packed`` and ``folder/dense``, the weights dequantised. The
packers and their inverses are written from the formats' descriptions; nothing of the package is
used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["RELEASED", "Released", "save_state", "write", "write_case"]

State = dict[str, Tensor]

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_DENSE_NAMES = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "router")


# ---- FP8


def fp8_blocks(W: Tensor, block: int = 128, power: bool = False) -> tuple[Tensor, Tensor]:
    """e4m3 codes and a scale per block; the last block of a row or column is partial."""
    N, K = W.shape
    scales = torch.empty(-(-N // block), -(-K // block))
    codes = torch.empty(N, K, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            s = W[part].abs().max().clamp(min=1e-12) / 448
            s = torch.exp2(torch.ceil(torch.log2(s))) if power else s
            scales[i, j] = s
            codes[part] = (W[part] / s).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales.to(torch.float8_e8m0fnu) if power else scales


def fp8_values(codes: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """Inverse of `fp8_blocks`, or of one scale per tensor."""
    s = scales.float()
    if s.ndim < 2:
        return codes.float() * s
    rows, columns = (torch.arange(n) // block for n in codes.shape)
    return codes.float() * s[rows][:, columns]


def pack_fp8(power: bool = False) -> Callable[[str, Tensor], State]:
    def pack(key: str, W: Tensor) -> State:
        codes, scales = fp8_blocks(W, power=power)
        return {key: codes, f"{key}_scale_inv": scales}

    return pack


def pack_mxfp8(key: str, W: Tensor) -> State:
    """Powers of two per 32 inputs, as bytes."""
    groups = W.unflatten(-1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1).clamp(min=1e-12) / 448))
    codes = (groups / torch.exp2(exponent)[..., None]).clamp(-448, 448)
    return {
        key: codes.flatten(-2).to(torch.float8_e4m3fn),
        f"{key}_scale_inv": (exponent + 127).to(torch.uint8),
    }


def mxfp8_state(packed: State) -> State:
    found = {}
    for key, t in packed.items():
        s = packed.get(f"{key}_scale_inv")
        if s is not None:
            power = torch.exp2(s.float() - 127).unsqueeze(-1)
            found[key] = (t.float().unflatten(-1, (-1, 32)) * power).flatten(-2)
        elif not key.endswith("_scale_inv"):
            found[key] = t.float()
    return found


def pack_fp8_in_fp32(key: str, W: Tensor) -> State:
    """Powers of two that are stored in fp32, as DeepSeek-V3.1's."""
    codes, scales = fp8_blocks(W, power=True)
    return {key: codes, f"{key}_scale_inv": scales.float()}


def pack_fp8_static(key: str, W: Tensor) -> State:
    scale = (W.abs().max() / 448).bfloat16()
    codes = (W / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    static = {f"{key.removesuffix('weight')}activation_scale": torch.tensor(0.02).bfloat16()}
    return {key: codes, f"{key}_scale_inv": scale, **static}


# ---- FP4

_FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp4_codes(x: Tensor) -> Tensor:
    """Nearest of the 16 values, halfway cases to the even code."""
    far = (x.abs().unsqueeze(-1) - _FP4).abs()
    even_first = far + torch.tensor([0.0, 1e-7] * 4)
    return (even_first.argmin(-1) + 8 * (x < 0)).to(torch.uint8)


def mxfp4(W: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks u8 [..., N, K / 32, 16], low nibble first, and bytes of the powers of two."""
    groups = W.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-126))) - 2
    codes = fp4_codes(groups / torch.exp2(exponent).unsqueeze(-1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


def fp4_values(blocks: Tensor) -> Tensor:
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    return torch.cat([_FP4, -_FP4])[codes]


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    power = torch.exp2(scales.view(torch.uint8).float() - 127)
    return (fp4_values(blocks) * power.unsqueeze(-1)).flatten(-2)


def pack_mxfp4(key: str, W: Tensor) -> State:
    """A stack [experts, in, out] of gpt-oss."""
    blocks, scales = mxfp4(W.mT)
    return {f"{key}_blocks": blocks, f"{key}_scales": scales}


def pack_fp4_expert(key: str, W: Tensor) -> State:
    blocks, scales = mxfp4(W)
    codes = blocks.flatten(-2).view(torch.int8)
    return {key: codes, f"{key}_scale_inv": scales.view(torch.float8_e8m0fnu)}


# ---- compressed-tensors


def int4_words(codes: Tensor) -> Tensor:
    """Eight columns of [-8, 7] per int32 word, the first in the low bits, 8 added."""
    N, K = codes.shape
    nibbles = torch.nn.functional.pad(codes.long() + 8, (0, -K % 8)).view(N, -1, 8)
    words = sum(nibbles[..., i] << (4 * i) for i in range(8))
    return torch.as_tensor(words).to(torch.int64).to(torch.int32)


def pack_int4(group: int, symmetric: bool = True) -> Callable[[str, Tensor], State]:
    def pack(key: str, W: Tensor) -> State:
        N, K = W.shape
        groups = W.view(N, K // group, group)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if symmetric:
            s = (groups.abs().amax(-1) / 7.5).bfloat16()
            zero = torch.zeros_like(s)
        else:
            s = ((high - low) / 15).bfloat16()
            zero = (-8 - low / s.float()).round().clamp(-8, 7)
        codes = (groups / s.float()[..., None]).round().add(zero[..., None]).clamp(-8, 7)
        found = {
            f"{key}_packed": int4_words(codes.view(N, K)),
            f"{key}_scale": s,
            f"{key}_shape": torch.tensor([N, K]),
        }
        if not symmetric:
            found[f"{key}_zero_point"] = int4_words(zero.mT).mT
        return found

    return pack


def int4_nibbles(words: Tensor) -> Tensor:
    return torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2) - 8


def pack_rows(key: str, W: Tensor) -> State:
    """FP8 with one scale per row."""
    s = (W.abs().amax(-1, keepdim=True) / 448).bfloat16()
    return {key: (W / s.float()).clamp(-448, 448).to(torch.float8_e4m3fn), f"{key}_scale": s}


def pack_int8(key: str, W: Tensor) -> State:
    s = (W.abs().amax(-1, keepdim=True) / 127).bfloat16()
    return {key: (W / s.float()).round().clamp(-128, 127).to(torch.int8), f"{key}_scale": s}


def pack_nvfp4(key: str, W: Tensor) -> State:
    outer = 448 * 6 / W.abs().max()
    groups = W.unflatten(-1, (-1, 16))
    s = (groups.abs().amax(-1) / 6 * outer).clamp(max=448).to(torch.float8_e4m3fn)
    codes = fp4_codes(groups / (s.float() / outer).clamp(min=1e-12)[..., None]).flatten(-2)
    return {
        f"{key}_packed": codes[..., 0::2] | (codes[..., 1::2] << 4),
        f"{key}_scale": s,
        f"{key}_global_scale": outer.reshape(1),
    }


# ---- AWQ and GPTQ


def words(nibbles: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """Eight values [..., 8 n] per word; ``order[i]`` is the place of nibble i."""
    each = nibbles.long().unflatten(-1, (-1, 8))
    return sum_of([each[..., place] << (4 * i) for i, place in enumerate(order)])


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0).to(torch.int32)


def unwords(packed: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    found = torch.empty(*packed.shape, 8)
    for i, place in enumerate(order):
        found[..., place] = ((packed >> (4 * i)) & 15).float()
    return found.flatten(-2)


AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def asymmetric(W: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], zero points and scales [K / group, N]."""
    groups = W.mT.unflatten(0, (-1, group))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    s = ((high - low) / 15).half()
    zero = (-low / s.float()).round().clamp(1, 15)
    codes = (groups / s.float()[:, None]).round().add(zero[:, None]).clamp(0, 15)
    return codes.flatten(0, 1), zero, s


def pack_awq(key: str, W: Tensor) -> State:
    codes, zero, s = asymmetric(W, 32)
    name = key.removesuffix("weight")
    return {f"{name}qweight": words(codes, AWQ), f"{name}qzeros": words(zero, AWQ),
            f"{name}scales": s}  # fmt: skip


def pack_gptq(less: int, desc_act: bool = False) -> Callable[[str, Tensor], State]:
    def pack(key: str, W: Tensor) -> State:
        K = W.shape[1]
        group = torch.arange(K, dtype=torch.int32) // 32
        if desc_act:
            group = group[torch.randperm(K, generator=torch.Generator().manual_seed(len(key)))]
        order = group.argsort(stable=True)
        codes, zero, s = asymmetric(W[:, order], 32)
        codes = codes[order.argsort()]
        name = key.removesuffix("weight")
        return {
            f"{name}qweight": words(codes.mT).mT,
            f"{name}qzeros": words(zero - less),
            f"{name}scales": s,
            f"{name}g_idx": group,
        }

    return pack


def columns_state(awq: bool, less: int = 0) -> Callable[[State], State]:
    def values(packed: State) -> State:
        found = {}
        for key, t in packed.items():
            if key.endswith(("qzeros", "scales", "g_idx")):
                continue
            if not key.endswith("qweight"):
                found[key] = t.float()
                continue
            name = key.removesuffix("qweight")
            order = AWQ if awq else range(8)
            codes = unwords(t, order) if awq else unwords(t.mT).mT
            zero, s = unwords(packed[f"{name}qzeros"], order) + less, packed[f"{name}scales"]
            group = packed.get(f"{name}g_idx", torch.arange(len(codes)) // 32).long()
            found[f"{name}weight"] = ((codes - zero[group]) * s.float()[group]).mT
        return found

    return values


def compressed_state(packed: State) -> State:
    found = {}
    for key, t in packed.items():
        if key.endswith(("_scale", "_shape", "_zero_point", "_global_scale")):
            continue
        name = key.removesuffix("_packed")
        s, outer = packed.get(f"{name}_scale"), packed.get(f"{name}_global_scale")
        if s is None:
            found[key] = t.float()
        elif outer is not None:
            scales = (s.float() / outer).unsqueeze(-1)
            found[name] = (fp4_values(t).unflatten(-1, (-1, 16)) * scales).flatten(-2)
        elif t.dtype == torch.int32:
            N, K = packed[f"{name}_shape"].tolist()
            codes = int4_nibbles(t)[:, :K].float().view(N, s.shape[1], -1)
            zero = packed.get(f"{name}_zero_point")
            if zero is not None:
                codes = codes - int4_nibbles(zero.mT)[:, :N].mT.float().unsqueeze(-1)
            found[name] = (codes * s.float().unsqueeze(-1)).view(N, K)
        else:
            found[name] = t.float() * s.float()
    return found


def pack_modelopt(key: str, W: Tensor) -> State:
    """NVFP4 whose second scale multiplies."""
    found = pack_nvfp4(key, W)
    name = key.removesuffix("weight")
    outer = 1 / found.pop(f"{key}_global_scale")[0]
    return {
        key: found[f"{key}_packed"],
        f"{key}_scale": found[f"{key}_scale"],
        f"{key}_scale_2": outer,
        f"{name}input_scale": torch.tensor(0.01),
    }


def pack_modelopt_fp8(key: str, W: Tensor) -> State:
    """One scale per matrix."""
    s = W.abs().max() / 448
    name = key.removesuffix("weight")
    return {
        key: (W / s).clamp(-448, 448).to(torch.float8_e4m3fn),
        f"{key}_scale": s,
        f"{name}input_scale": torch.tensor(0.01),
    }


def modelopt_state(packed: State) -> State:
    found = {}
    for key, t in packed.items():
        if key.endswith(("_scale", "_scale_2")):
            continue
        s, outer = packed.get(f"{key}_scale"), packed.get(f"{key}_scale_2")
        if s is None:
            found[key] = t.float()
        elif outer is None:
            found[key] = t.float() * s.float()
        else:
            scales = (s.float() * outer).unsqueeze(-1)
            found[key] = (fp4_values(t).unflatten(-1, (-1, 16)) * scales).flatten(-2)
    return found


# ---- torchao


def pack_torchao(group: int | None = None, fp8: bool = False) -> Callable[[str, Tensor], State]:
    """One scale per row, or per group of columns; int8 with zero points that are 0."""

    def pack(key: str, W: Tensor) -> State:
        name = f"{key.removesuffix('weight')}_weight"
        groups = W.unflatten(-1, (-1, group or W.shape[-1]))
        s = groups.abs().amax(-1) / (448 if fp8 else 127)
        codes = (groups / s[..., None]).flatten(-2)
        found = {f"{name}_scale": s}
        if fp8:
            return {f"{name}_qdata": codes.to(torch.float8_e4m3fn), **found}
        found[f"{name}_zero_point"] = torch.zeros_like(s, dtype=torch.int8)
        return {f"{name}_qdata": codes.round().to(torch.int8), **found}

    return pack


def torchao_state(packed: State) -> State:
    found = {}
    for key, t in packed.items():
        name = key.removesuffix("_qdata")
        if name == key and not key.endswith(("_scale", "_zero_point")):
            found[key] = t.float()
        elif name != key:
            s = packed[f"{name}_scale"]
            zero = packed.get(f"{name}_zero_point", torch.zeros(1))
            codes = t.float().unflatten(-1, (s.shape[-1], -1)) - zero.float()[..., None]
            found[name.replace("._", ".")] = (codes * s[..., None]).flatten(-2)
    return found


def torchao(kind: str, **data: Any) -> dict[str, Any]:
    config = {"_type": kind, "_version": 2, "_data": data}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config},
        "modules_to_not_convert": None,
        "include_input_output_embeddings": False,
    }


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp[.]gate$"],
        "quantization_status": "compressed",
    }


# ---- checkpoints


@dataclass(frozen=True)
class Released:
    """One format.

    Attributes:
        config: Builds the model's configuration.
        quantization: The ``quantization_config`` of config.json.
        pack: Packs one weight: (name, values) → tensors of the file.
        values: Dequantises: tensors of the file by name → values by the dense names.
        label: Label of the storage that holds most weights.
        packs: Whether the weight of this name is packed.
    """

    config: Callable[[], Any]
    quantization: Mapping[str, Any]
    pack: Callable[[str, Tensor], State]
    values: Callable[[State], State]
    label: str
    packs: Callable[[str], bool] = lambda key: key.endswith("weight")


def fp8_state(packed: State) -> State:
    found = {}
    for key, t in packed.items():
        if key.endswith(("_scale_inv", "activation_scale")):
            continue
        scales = packed.get(f"{key}_scale_inv")
        if scales is None:
            found[key] = t.float()
        elif t.dtype == torch.int8:
            found[key] = mxfp4_values(t.view(torch.uint8).unflatten(-1, (-1, 16)), scales)
        else:
            found[key] = fp8_values(t, scales)
    return found


def mxfp4_state(packed: State) -> State:
    found = {}
    for key, t in packed.items():
        if key.endswith("_blocks"):
            name = key.removesuffix("_blocks")
            found[name] = mxfp4_values(t, packed[f"{name}_scales"]).mT.contiguous()
        elif not key.endswith("_scales"):
            found[key] = t.float()
    return found


def qwen3() -> Any:
    return tr.Qwen3Config(
        hidden_size=192, intermediate_size=160, head_dim=48, attention_bias=True, **_COMMON
    )


def qwen3_moe() -> Any:
    """Half of gate_up is no multiple of the block."""
    return tr.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=96, num_experts=4, head_dim=16,
        num_experts_per_tok=2, **_COMMON,
    )  # fmt: skip


def llama() -> Any:
    return tr.LlamaConfig(hidden_size=64, intermediate_size=96, **_COMMON)


def gpt_oss() -> Any:
    return tr.GptOssConfig(
        hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2,
        head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        **_COMMON,
    )  # fmt: skip


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

RELEASED: dict[str, Released] = {
    "fp8": Released(qwen3, _FP8, pack_fp8(), fp8_state, "fp8"),
    "fp8 ue8m0": Released(
        qwen3, {**_FP8, "scale_fmt": "ue8m0"}, pack_fp8(power=True), fp8_state, "fp8"
    ),
    "fp8 static": Released(
        qwen3, {**_FP8, "activation_scheme": "static", "weight_block_size": None}, pack_fp8_static,
        fp8_state, "fp8",
    ),
    "fp8 experts": Released(qwen3_moe, _FP8, pack_fp8(), fp8_state, "fp8"),
    "mxfp4": Released(
        gpt_oss,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn",
         "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
        pack_mxfp4, mxfp4_state, "mxfp4",
        lambda key: key.endswith(("experts.gate_up_proj", "experts.down_proj")),
    ),
    "fp4 experts": Released(
        qwen3_moe, {**_FP8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
        lambda key, W: (pack_fp4_expert if ".experts." in key else pack_fp8(power=True))(key, W),
        fp8_state, "mxfp4",
    ),
}  # fmt: skip


RELEASED |= {
    "mxfp8": Released(
        qwen3_moe, {**_FP8, "quant_method": "mxfp8", "weight_block_size": [1, 32],
                    "scale_fmt": "ue8m0"},
        pack_mxfp8, mxfp8_state, "fp8",
    ),
    "fp8 ue8m0 in fp32": Released(
        qwen3, {**_FP8, "scale_fmt": "ue8m0"}, pack_fp8_in_fp32, fp8_state, "fp8"
    ),
    "awq": Released(
        llama, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                "version": "gemm"},
        pack_awq, columns_state(True), "awq",
    ),
    "gptq": Released(
        llama, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
        pack_gptq(1), columns_state(False, 1), "gptq",
    ),
    "gptq_v2": Released(
        llama, {"quant_method": "gptq", "bits": 4, "group_size": 32,
                "checkpoint_format": "gptq_v2"},
        pack_gptq(0), columns_state(False), "gptq_v2",
    ),
}  # fmt: skip
RELEASED |= {
    "awq experts": Released(
        qwen3_moe, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                    "version": "gemm", "modules_to_not_convert": ["mlp.gate", "lm_head"]},
        pack_awq, columns_state(True), "awq",
    ),
    "gptq experts": Released(
        qwen3_moe, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False,
                    "dynamic": {r"-:.*mlp\.gate$": {}}},
        pack_gptq(1), columns_state(False, 1), "gptq",
    ),
    "gptq desc_act": Released(
        llama, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        pack_gptq(1, desc_act=True), columns_state(False, 1), "gptq",
    ),
}  # fmt: skip
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_ROWS = {"num_bits": 8, "strategy": "channel", "symmetric": True}
RELEASED |= {
    "int4": Released(
        llama, compressed("pack-quantized", symmetric=True, **_INT4), pack_int4(32),
        compressed_state, "int4",
    ),
    "int4 experts": Released(
        qwen3_moe, compressed("pack-quantized", symmetric=True, **_INT4), pack_int4(32),
        compressed_state, "int4",
    ),
    "int4 zero points": Released(
        qwen3_moe, compressed("pack-quantized", symmetric=False, **_INT4), pack_int4(32, False),
        compressed_state, "int4",
    ),
    "int8": Released(
        qwen3_moe, compressed("int-quantized", type="int", **_ROWS), pack_int8, compressed_state,
        "int8 (compressed-tensors)",
    ),
    "fp8 rows": Released(
        qwen3_moe, compressed("float-quantized", type="float", **_ROWS), pack_rows,
        compressed_state, "fp8 (compressed-tensors)",
    ),
    "nvfp4": Released(
        qwen3_moe,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
                   group_size=16, symmetric=True),
        pack_nvfp4, compressed_state, "fp4 (compressed-tensors)",
    ),
}  # fmt: skip


RELEASED |= {
    "modelopt nvfp4": Released(
        llama, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        pack_modelopt, modelopt_state, "nvfp4",
    ),
    "modelopt fp8": Released(
        llama, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        pack_modelopt_fp8, modelopt_state, "fp8 (modelopt)",
    ),
    "modelopt nvfp4 experts": Released(
        qwen3_moe,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*mlp.gate"]},
        lambda key, W: {k: t for k, t in pack_modelopt(key, W).items() if "input" not in k},
        modelopt_state, "nvfp4",
    ),
    "fp8 per-tensor experts": Released(
        qwen3_moe, {**_FP8, "weight_block_size": None},
        lambda key, W: {k: t for k, t in pack_fp8_static(key, W).items() if "activation" not in k},
        fp8_state, "fp8",
    ),
}  # fmt: skip


RELEASED |= {
    "torchao int8": Released(
        llama, torchao("Int8WeightOnlyConfig", group_size=None,
                       granularity={"_type": "PerGroup", "_data": {"group_size": 32}}),
        pack_torchao(32), torchao_state, "int8 (torchao)",
    ),
    "torchao fp8": Released(
        llama, torchao("Float8WeightOnlyConfig",
                       granularity={"_type": "PerRow", "_data": {"dim": -1}},
                       weight_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"}),
        pack_torchao(fp8=True), torchao_state, "fp8 (torchao)",
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the checkpoint and its dequantised twin; the same bytes in every call."""
    return write_case(RELEASED[name], folder)


def write_case(case: Released, folder: Path) -> tuple[Path, Path]:
    """`write` for a format that is not listed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = case.config()
        model = tr.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.ndim > 1 or "bias" in key:
                    p.normal_(0, 0.05)
    plain = folder / "plain"
    model.save_pretrained(plain)
    packed: State = {}
    for key, W in load_file(plain / "model.safetensors").items():
        is_packed = case.packs(key) and not any(part in key for part in _DENSE_NAMES)
        packed |= case.pack(key, W) if is_packed else {key: W}
    settings = json.loads((plain / "config.json").read_text())
    _save(folder / "dense", case.values(packed), settings)
    settings["quantization_config"] = dict(case.quantization)
    _save(folder / "packed", packed, settings)
    return folder / "packed", folder / "dense"


def _save(folder: Path, state: State, settings: Mapping[str, Any]) -> None:
    folder.mkdir()
    save_state(folder, state)
    (folder / "config.json").write_text(json.dumps(dict(settings)))


def save_state(folder: Path, state: State) -> None:
    """Write the tensors of a directory."""
    tensors = {key: t.contiguous() for key, t in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
