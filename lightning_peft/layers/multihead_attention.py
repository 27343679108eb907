"""`nn.MultiheadAttention`: edits on the projections that its own forward reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.layers.opaque import WeightsOps

__all__ = ["MultiheadAttentionOps"]


class MultiheadAttentionOps(WeightsOps):
    """`nn.MultiheadAttention`: in_proj_weight [3e, e] (or q, k, v apart), out_proj.weight [e,
    e].
    """

    def parameters(self, m: Any) -> Sequence[str]:
        """The projections that this module has."""
        if m.in_proj_weight is not None:
            return ("in_proj_weight", "out_proj.weight")
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")

    def bias(self, m: Any, name: str) -> str | None:
        """out_proj.bias, or in_proj_bias where the input projections are one weight."""
        if name == "out_proj.weight":
            return "out_proj.bias" if m.out_proj.bias is not None else None
        return "in_proj_bias" if name == "in_proj_weight" and m.in_proj_bias is not None else None

    def hf_refusal(self, m: Any, name: str) -> str:
        """peft knows only one joint input projection."""
        return (
            ""
            if m.in_proj_weight is not None
            else "peft takes no kdim or vdim other than embed_dim"
        )

    def hf_pack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """Half of B for the output projection: peft 0.21 adds that delta twice (once itself, once
        by the wrapped projection), in forward and in merge.
        """
        return t / 2 if name == "out_proj.weight" and layout == "up" else t

    def hf_unpack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """Inverse of `hf_pack`, exact."""
        t = super().hf_unpack(m, name, layout, t)
        return t * 2 if name == "out_proj.weight" and layout == "up" else t

    def hf_places(self, m: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
        """The output projection stands inside peft's wrapper."""
        return {n: "base_layer.out_proj" if n == "out_proj.weight" else "" for n in adapted}
