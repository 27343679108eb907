"""Full: every parameter is trained, on a copy; the baseline that the others are measured by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft.methods.base import SelectMethod
from lightning_peft.methods.registry import register

__all__ = ["Full"]


@register
@dataclass(frozen=True)
class Full(SelectMethod):
    """Every parameter of the model, or of the modules that `target_modules` names.

    The base keeps its bits beside the copy, so weights take twice their bytes; what that buys is
    switching, disabling and detaching.
    """

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """All of them."""
        return True
