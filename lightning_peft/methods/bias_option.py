"""Base of the methods whose type in peft has the option ``bias``."""

from __future__ import annotations

from lightning_peft.methods.base import WeightMethod

__all__ = ["BiasOption"]


class BiasOption(WeightMethod):
    """Base of methods that may train biases too; the dataclass of a method declares the field.

    Attributes:
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, or peft's word for
            those of adapted layers.
    """

    bias: str

    def trained_biases(self) -> str:
        """Return the biases of the base that `bias` chooses."""
        return self.bias if self.bias in ("none", "all") else "adapted"
