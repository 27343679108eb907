"""What `bench` measures: small stacks of known models' layers, adapted by us and by others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import attach
from lightning_peft.methods.lora import LoRA
from lightning_peft.storage import Quantization

__all__ = [
    "LINEAR",
    "SMOKE",
    "USUAL",
    "Absent",
    "Sizes",
    "blocks",
    "expert_stacks",
    "pack_by_bitsandbytes",
    "training_step",
]

#: Linear layers of a Llama block.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Absent(RuntimeError):
    """A row cannot be measured here, with the reason."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of all that is measured.

    Attributes:
        hidden: Width of a Llama block.
        inner: Width of its feed-forward part.
        heads: Attention heads.
        shared_heads: Heads of keys and values.
        blocks: Number of blocks.
        tokens: Tokens of a training step.
        batches: Sequences of a decoding step, one token each.
        rank: Rank of LoRA.
        experts: (hidden, inner, experts, experts per token) of a mixture.
        expert_tokens: Tokens of its step.
        matrix: (N, K) that is dequantised.
    """

    hidden: int
    inner: int
    heads: int
    shared_heads: int
    blocks: int
    tokens: int
    batches: tuple[int, ...]
    rank: int
    experts: tuple[int, int, int, int]
    expert_tokens: int
    matrix: tuple[int, int]


#: Four blocks of Llama-3-8B and one layer of Qwen3-30B-A3B's experts.
USUAL = Sizes(
    4096, 14336, 32, 8, 4, 2048, (1, 8, 32), 16, (2048, 768, 128, 8), 4096, (14336, 4096)
)  # fmt: skip
#: Sizes for a test on a CPU. bitsandbytes 0.50.2 misreads rows shorter than a block of 64.
SMOKE = Sizes(64, 128, 4, 2, 2, 32, (1, 8, 32), 4, (64, 64, 4, 2), 16, (64, 128))


def blocks(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Return makers of one stack of blocks by name: ours, and those it is compared with."""
    dense = _dense(sizes, device)
    return {
        "ours": lambda: _ours(copy.deepcopy(dense), sizes),
        "peft + bitsandbytes": lambda: _peft(copy.deepcopy(dense), sizes, quantized=True),
        "peft bf16": lambda: _peft(copy.deepcopy(dense), sizes, quantized=False),
    }


def _dense(sizes: Sizes, device: torch.device) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Absent(str(error)) from error
    config = LlamaConfig(
        vocab_size=256, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.blocks, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.shared_heads, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def _ours(model: nn.Module, sizes: Sizes) -> nn.Module:
    lora = LoRA(r=sizes.rank, alpha=2 * sizes.rank, target_modules=LINEAR)
    attach(model, lora, quantization=Quantization())
    return _trained_in_bf16(model)


def _peft(model: nn.Module, sizes: Sizes, *, quantized: bool) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise Absent(str(error)) from error
    if quantized:
        pack_by_bitsandbytes(model)
    config = peft.LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=LINEAR)
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return _trained_in_bf16(wrapped)


def _trained_in_bf16(model: nn.Module) -> nn.Module:
    """As ``precision="bf16-true"``: adapters in the dtype of the activations, for everyone."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    return model


def pack_by_bitsandbytes(model: nn.Module) -> None:
    """Replace the linear layers named in `LINEAR` by bitsandbytes' NF4 layers, in place.

    Raises:
        Absent: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise Absent(str(error)) from error
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name in LINEAR:
                packed = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False,
                    compute_dtype=torch.bfloat16, quant_type="nf4",
                )  # fmt: skip
                packed.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4",
                    compress_statistics=True,
                )  # fmt: skip
                setattr(parent, name, packed.to(layer.weight.device))


def training_step(model: Any, tokens: Tensor) -> Callable[[], None]:
    """Return one step: forward, backward with recomputed blocks, AdamW."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    inner.config.use_cache = False
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=tokens.device.type == "cuda")

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def expert_stacks(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Return makers of one mixture's experts by name."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise Absent(str(error)) from error
    hidden, inner, number, top = sizes.experts
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=number, num_experts_per_tok=top
    )
    config._experts_implementation = "grouped_mm"

    def frozen() -> nn.Module:
        with device:
            made = Qwen3MoeExperts(config).to(torch.bfloat16)
        draw = torch.Generator(device).manual_seed(0)
        for p in made.parameters():
            p.requires_grad_(False).normal_(std=p.shape[-1] ** -0.5, generator=draw)
        return nn.ModuleDict({"experts": made})

    def ours() -> nn.Module:
        model = frozen()
        lora = LoRA(r=sizes.rank, target_modules=["experts"])
        attach(model, lora, quantization=Quantization())
        return _trained_in_bf16(model)

    def theirs() -> nn.Module:
        try:
            import peft
        except ImportError as error:
            raise Absent(str(error)) from error
        model = frozen()
        config = peft.LoraConfig(r=sizes.rank, target_parameters=_EXPERTS)
        peft.inject_adapter_in_model(config, model)
        return _trained_in_bf16(model)

    return {"ours": ours, "peft bf16": theirs, "frozen bf16": frozen}
