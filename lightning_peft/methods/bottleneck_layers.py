"""The layers of a bottleneck adapter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["NON_LINEARITIES", "Bottleneck"]

NON_LINEARITIES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leakyrelu": nn.LeakyReLU,
}


class Bottleneck(nn.Module):
    """Two linear layers with a non-linearity between; options say which other parts exist."""

    ln_before: nn.LayerNorm
    ln_after: nn.LayerNorm
    gate: nn.Linear
    scaling: nn.Parameter

    def __init__(
        self,
        widths: tuple[int, int],
        size: int,
        non_linearity: str,
        scaling: str | None,
        *,
        norms: tuple[bool, bool],
        gated: bool,
        init: str,
    ) -> None:
        """Build the layers.

        Args:
            widths: Width of the input and of the output.
            size: Width of the bottleneck.
            non_linearity: A name in `NON_LINEARITIES`.
            scaling: ``"learned"`` for a trained scalar, ``"channel"`` for one factor per output.
            norms: Whether a LayerNorm stands before `down`, and after `up`.
            gated: Whether there is a layer for gates.
            init: ``"zero"`` or ``"bert"``, as in `BottleneckAdapter`.
        """
        super().__init__()
        width_in, width_out = widths
        if norms[0]:
            self.ln_before = nn.LayerNorm(width_in)
        self.down = nn.Linear(width_in, size)
        self.f = NON_LINEARITIES[non_linearity]()
        self.up = nn.Linear(size, width_out)
        if norms[1]:
            self.ln_after = nn.LayerNorm(width_out)
        if gated:
            self.gate = nn.Linear(width_in, 1)
        if scaling is not None:
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else width_out))
        if init == "bert":
            for layer in (self.down, self.up):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            for tensor in (self.down.bias, self.up.weight, self.up.bias):
                nn.init.zeros_(tensor)

    def change(self, x: Tensor, dropout: float) -> Tensor:
        """up(f(down(x))) with the norms and dropout, before gates and scale."""
        x = self._in_own_dtype(x)
        z = self.ln_before(x) if "ln_before" in self._modules else x
        z = self.up(self.f(self.down(z)))
        if "ln_after" in self._modules:
            z = self.ln_after(z)
        return nn.functional.dropout(z, dropout, self.training) if dropout else z

    def gate_of(self, x: Tensor, *, per_token: bool) -> Tensor:
        """σ(Linear(x)) [..., 1], of each token or their mean."""
        gate = torch.sigmoid(self.gate(self._in_own_dtype(x)))
        return gate if per_token else gate.mean(dim=-2, keepdim=True)

    def _in_own_dtype(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.down.weight.dtype)
