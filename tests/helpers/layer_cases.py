"""Kinds of layer and storages that the generic suite crosses with the table of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Quantization

__all__ = ["LAYERS", "Layer"]


@dataclass(frozen=True)
class Layer:
    """One row.

    Attributes:
        name: Its id.
        make: Builds the module.
        inputs: Builds an input for it.
        quantization: What attach quantises with.
        output: The tensor of its output.
        tolerance: Of forward against merged forward, relative.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    quantization: Quantization | None = None
    output: Callable[[Any], Tensor] = lambda y: y
    tolerance: float = 1e-5

    def build(self) -> nn.Module:
        """In a Sequential, so that the layer has a name."""
        return nn.Sequential(self.make())

    def run(self, model: nn.Module, x: Any) -> Tensor:
        """Forward to one tensor."""
        return self.output(model(x))


def _conv1d_gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(12, 16)
    nn.init.normal_(layer.weight)
    return layer


def _bnb4() -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    return layer.to("cpu").train()


def _bnb8() -> nn.Module:
    import bitsandbytes

    dense = nn.Linear(64, 32)
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


class SelfAttention(nn.MultiheadAttention):
    """Attention of a sequence to itself, so that it takes one input."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def _features(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


LAYERS = [
    Layer("linear", lambda: nn.Linear(16, 12), _features(3, 5, 16)),
    Layer("no_bias", lambda: nn.Linear(16, 12, bias=False), _features(3, 5, 16)),
    Layer("odd", lambda: nn.Linear(13, 7), _features(3, 13)),
    Layer("conv1d_gpt2", _conv1d_gpt2, _features(3, 5, 16)),
    Layer("embedding", lambda: nn.Embedding(20, 8), lambda: torch.randint(0, 20, (3, 7))),
    Layer("conv1d", lambda: nn.Conv1d(6, 8, 3, stride=2), _features(3, 6, 11)),
    Layer(
        "conv2d", lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2, dilation=2), _features(3, 6, 9, 9)
    ),
    Layer("conv3d", lambda: nn.Conv3d(4, 6, 2), _features(2, 4, 4, 4, 4)),
    Layer("depthwise", lambda: nn.Conv2d(6, 6, 3, groups=6), _features(3, 6, 9, 9)),
    Layer(
        "reflect",
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        _features(2, 4, 6, 6),
    ),
    Layer("mha", lambda: SelfAttention(16, 4, batch_first=True), _features(3, 5, 16)),
    Layer(
        "lstm",
        lambda: nn.LSTM(16, 8, 2, bidirectional=True),
        _features(5, 3, 16),
        output=lambda y: y[0],
    ),
    Layer("gru", lambda: nn.GRU(16, 8), _features(5, 3, 16), output=lambda y: y[0]),
    Layer("nf4", lambda: nn.Linear(64, 32), _features(3, 5, 64), Quantization("nf4")),
    Layer(
        "nf4_plain",
        lambda: nn.Linear(64, 32),
        _features(3, 64),
        Quantization("nf4", double_quant=False),
    ),
    Layer(
        "nf4_odd", lambda: nn.Linear(33, 7), _features(3, 33), Quantization("nf4", block_size=32)
    ),
    Layer("nf4_conv1d_gpt2", _conv1d_gpt2, _features(3, 16), Quantization("nf4", block_size=32)),
    Layer("fp4", lambda: nn.Linear(64, 32), _features(3, 64), Quantization("fp4")),
    Layer("bnb4", _bnb4, _features(3, 5, 64), tolerance=0.2),
    Layer("bnb8", _bnb8, _features(3, 5, 64), tolerance=0.05),
]
