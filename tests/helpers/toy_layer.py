"""A layer kind from outside the package, in one file: y = gain · x K + b with K [in, out]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_peft.layers import register_layer
from lightning_peft.layers.base import MatrixOps


class GainLinear(nn.Module):
    """A linear layer with a transposed weight of another name and a constant gain."""

    def __init__(self, in_features: int, out_features: int, gain: float = 2.0) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x @ self.kernel) + self.bias


class GainLinearOps(MatrixOps):
    """Canonical weight: Kᵀ [out, in]. The gain is part of the layer's function."""

    is_linear = True

    def parameters(self, m: nn.Module) -> Sequence[str]:
        return ("kernel",)

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        return torch.Size((natural[1], natural[0]))

    def to_canonical(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        return W.mT

    def from_canonical(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        return M.mT

    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        y = cast(float, m.gain) * (x @ W)
        return y if b is None else y + b

    def low_rank(
        self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        return cast(float, m.gain) * super().low_rank(m, x, A, B, scaling)


register_layer(GainLinear, GainLinearOps())
