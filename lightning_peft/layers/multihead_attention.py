"""`nn.MultiheadAttention`: edits on the projections that its own forward reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.layers.example_inputs import random_inputs
from lightning_peft.layers.opaque import WeightsOps

__all__ = ["MultiheadAttentionOps"]


class MultiheadAttentionOps(WeightsOps):
    """Weights in_proj_weight [3e, e] (or q, k and v separately) and out_proj.weight [e, e]."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """The projections that this module has."""
        if _attention(m).in_proj_weight is not None:
            return ("in_proj_weight", "out_proj.weight")
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")

    def example_inputs(self, m: nn.Module) -> tuple[Tensor, ...] | None:
        """Query, key and value of two samples and three positions."""
        attention = _attention(m)
        if base_class(m).forward is not nn.MultiheadAttention.forward:
            return None
        shapes = [(2, 3, width) for width in (attention.embed_dim, attention.kdim, attention.vdim)]
        return random_inputs(m, attention.out_proj.weight.dtype, *shapes)

    def bias(self, m: nn.Module, name: str) -> str | None:
        """out_proj.bias, or in_proj_bias if the input projections are one weight."""
        attention = _attention(m)
        if name == "out_proj.weight":
            return "out_proj.bias" if attention.out_proj.bias is not None else None
        joint = name == "in_proj_weight" and attention.in_proj_bias is not None
        return "in_proj_bias" if joint else None


def _attention(m: nn.Module) -> nn.MultiheadAttention:
    """The module as the attention it is: ops are found by class."""
    return cast(nn.MultiheadAttention, m)
