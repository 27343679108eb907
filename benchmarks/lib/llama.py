"""Llama-3-8B's shape with random weights, made a layer at a time, adapted by us and by Hugging Face
peft: what the end-to-end benchmarks run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_peft import LoRA, Quantization, attach
from lightning_peft.diagnostics.bench_models import LINEAR, pack_by_bitsandbytes


def config(smoke: bool) -> Any:
    from transformers import LlamaConfig

    if smoke:
        return LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_theta=500000.0,
    )  # fmt: skip


def base(smoke: bool, device: torch.device) -> nn.Module:
    """The dense model in bf16, on the device."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: nn.Module = LlamaForCausalLM(config(smoke))
    finally:
        torch.set_default_dtype(before)
    return model


def ours(model: nn.Module, r: int, *, quantized: bool = True, compute: str = "auto") -> nn.Module:
    quantization = Quantization(compute=compute) if quantized else None  # type: ignore[arg-type]
    attach(model, LoRA(r=r, alpha=2 * r, target_modules=LINEAR), quantization=quantization)
    return model


def hugging_face(model: nn.Module, r: int, *, quantized: bool) -> nn.Module:
    """peft over bitsandbytes' layers, or over the dense ones."""
    import peft

    if quantized:
        pack_by_bitsandbytes(model)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEAR)
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def liger(model: nn.Module) -> str:
    """Apply liger-kernel where it installs; a reason where it does not."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        return str(error)
    _apply_liger_kernel_to_instance(model=model)
    return ""
