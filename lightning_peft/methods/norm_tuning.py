"""NormTuning: only scales and shifts of normalisation layers are trained.

Source: Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language
Models"; Zhao et al. 2024, "Tuning LayerNorm in Attention".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.methods.base import HFFormat, SelectMethod
from lightning_peft.methods.registry import register

__all__ = ["NormTuning"]


@register
@dataclass(frozen=True)
class NormTuning(SelectMethod):
    """Parameters of every module whose class is a normalisation, as its name says.

    ``LayerNorm``, ``RMSNorm``, ``BatchNorm2d``, ``GroupNorm``, ``LlamaRMSNorm``, ``T5LayerNorm`` …
    Running statistics are copied with the parameters: training moves the copy's.

    Attributes:
        bias: Whether shifts are trained too, not only scales.
        any_layer: Whether layers that are no normalisation are trained too, if `target_modules`
            names them. peft's ``LN_TUNING`` takes any layer.
    """

    copies_statistics: ClassVar[bool] = True

    bias: bool = True
    any_layer: bool = False

    hf = HFFormat(
        peft_type="LN_TUNING",
        tensors={},
        config={},
    )

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether the parameter belongs to a normalisation itself, not to a module inside it."""
        parts = [n for n, _ in owner.named_children() if n != "peft"]
        named = self.any_layer and self.target_modules is not None
        if parts or not (named or "norm" in type(owner).__name__.lower()):
            return False
        return self.bias or name.rpartition(".")[2] != "bias"
