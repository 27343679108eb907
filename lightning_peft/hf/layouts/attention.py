"""Peft's layout of `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_peft.hf.layouts.base import MatrixLayout

__all__ = ["MultiheadAttentionLayout"]


class MultiheadAttentionLayout(MatrixLayout[nn.MultiheadAttention]):
    """A joint input projection, and an output projection inside peft's wrapper."""

    def refusal(self, name: str) -> str:
        """Separate q, k and v projections: peft knows only the joint one."""
        joint = self.module.in_proj_weight is not None
        return "" if joint else "peft takes no kdim or vdim other than embed_dim"

    def nested_paths(self, adapted: Sequence[str]) -> dict[str, str]:
        """The output projection lies inside peft's wrapper."""
        return {n: "base_layer.out_proj" if n == "out_proj.weight" else "" for n in adapted}

    def to_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Halve B of the output projection, whose change peft 0.21 adds twice.

        It is added once by itself and once by the wrapped projection, in forward and in merge.
        """
        return t / 2 if name == "out_proj.weight" and axes == "up" else t

    def from_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Inverse of `to_peft`, exact."""
        t = super().from_peft(name, axes, t)
        return t * 2 if name == "out_proj.weight" and axes == "up" else t
