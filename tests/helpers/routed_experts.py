"""Small fused experts, decorated as those of transformers, with a reference of their function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SHAPES", "DenseExperts", "RoutedExperts"]

EXPERTS, WIDTH, INNER = 3, 8, 16
SHAPES = {"gate_up_proj": (EXPERTS, 2 * INNER, WIDTH), "down_proj": (EXPERTS, WIDTH, INNER)}


class RoutedExperts(nn.Module):
    """What the instance says about itself, and its function of given weights."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        y: Tensor = self.act_fn(gate) * up
        return y

    def reference(
        self, up: Tensor, down: Tensor, x: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """The experts' function by gathering one weight per token and expert."""
        h = self._apply_gate(torch.einsum("tkoi,ti->tko", up[index], x))
        y = torch.einsum("tkoi,tki->tko", down[index], h)
        return (y * weights.unsqueeze(-1)).sum(1)


class DenseExperts(RoutedExperts):
    """Floating weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(SHAPES["gate_up_proj"]) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(SHAPES["down_proj"]) * 0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.reference(self.gate_up_proj, self.down_proj, x, index, weights)
