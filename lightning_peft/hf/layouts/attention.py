"""Peft's layout of `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_peft.hf.layouts.base import MatrixLayout, is_before

__all__ = ["FIXED", "MultiheadAttentionLayout"]

#: First version of peft that adds the change of the output projection once (peft#3774).
FIXED = (0, 22)


class MultiheadAttentionLayout(MatrixLayout[nn.MultiheadAttention]):
    """A joint input projection, and an output projection inside peft's wrapper."""

    @property
    def kind(self) -> str:
        """``"MultiheadAttention"``."""
        return "MultiheadAttention"

    @property
    def adapts_all_weights(self) -> bool:
        """True: both projections."""
        return True

    @property
    def note(self) -> str:
        """Once or twice."""
        if is_before(self.peft_version, FIXED):
            return ""
        return (
            f"the change of its output projection is added once, as from peft 0.22 on (peft#3774); "
            f"the file says {self.peft_version}"
        )

    def refusal(self, name: str) -> str:
        """Separate q, k and v projections: peft knows only the joint one."""
        joint = self.module.in_proj_weight is not None
        return "" if joint else "peft takes no kdim or vdim other than embed_dim"

    def nested_paths(self, adapted: Sequence[str]) -> dict[str, str]:
        """The output projection lies inside peft's wrapper."""
        return {n: "base_layer.out_proj" if n == "out_proj.weight" else "" for n in adapted}

    def to_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Halve B of the output projection, whose change peft adds twice up to 0.21.

        It is added once by itself and once by the wrapped projection, in forward and in merge
        (peft#3774). Its lora_bias is added once, and that of the joint projection never.

        Raises:
            ValueError: a bias of the joint projection that is not 0.
        """
        if name != "out_proj.weight":
            if axes == "bias" and t.any():
                raise ValueError(
                    "save_adapter: nn.MultiheadAttention: expected no lora_bias, which peft leaves "
                    "out on the joint input projection, got a trained one; keep the adapter with "
                    "adapter_state_dict()"
                )
            return t
        return t / 2 if axes == "up" else t

    def from_peft(self, name: str, axes: str, t: Tensor) -> Tensor:
        """Inverse of `to_peft`, exact; files from peft 0.22 on have the change once."""
        t = super().from_peft(name, axes, t)
        if name != "out_proj.weight":
            return torch.zeros_like(t) if axes == "bias" else t
        return t * 2 if axes == "up" and is_before(self.peft_version, FIXED) else t
