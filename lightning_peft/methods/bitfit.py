"""BitFit: only biases are trained.  W' = W,  b' = b + Δb.

Source: Ben Zaken et al. 2022, "BitFit", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft.methods.base import SelectMethod
from lightning_peft.methods.registry import register

__all__ = ["BitFit"]


@register
@dataclass(frozen=True)
class BitFit(SelectMethod):
    """Every bias of the model, or of the modules that `target_modules` names.

    A model without biases (Llama) has none to train, which raises: use IA3, or LoRA with
    ``lora_bias=True``.
    """

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether the parameter is a bias."""
        leaf = name.rpartition(".")[2]
        return leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias")
