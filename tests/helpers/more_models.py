"""Tiny models of architectures that only the exact exchange with peft runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr
from torch import Tensor, nn

from tests.helpers.peft_exchange import build

__all__ = ["MORE_MODELS", "base_of"]

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _gptj() -> nn.Module:
    """Attention and feed-forward block side by side; rotary positions on half of a head."""
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tr.GPTJForCausalLM(tr.GPTJConfig(vocab_size=99, rotary_dim=4, **sizes, **_TOKENS))


def _starcoder2() -> nn.Module:
    """Grouped heads, with biases."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = tr.Starcoder2Config(
        vocab_size=99, max_position_embeddings=64, **sizes, **heads, **_TOKENS
    )
    return tr.Starcoder2ForCausalLM(config)


def _swin() -> nn.Module:
    """Windows of an image; the second stage is twice as wide as the first."""
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    config = tr.SwinConfig(depths=[1, 1], num_heads=[2, 4], num_labels=3, **sizes)
    return tr.SwinForImageClassification(config)


MORE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gptj": _gptj,
    "starcoder2": _starcoder2,
    "swin": _swin,
}


def base_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A base and a batch, the same at every call."""
    if name not in MORE_MODELS:
        return build(name)
    torch.manual_seed(7)
    base = MORE_MODELS[name]().eval()
    if name == "swin":
        return base, {"pixel_values": torch.randn(2, 3, 16, 16)}
    return base, {"input_ids": torch.randint(3, 99, (2, 7))}
