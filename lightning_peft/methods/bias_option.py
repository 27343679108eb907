"""Base of the methods whose type in peft has the option ``bias``."""

from __future__ import annotations

from typing import ClassVar

from lightning_peft.methods.base import WeightMethod
from lightning_peft.methods.checks import require_bias

__all__ = ["BiasOption"]


class BiasOption(WeightMethod):
    """Base of methods that may train biases too; the dataclass of a method declares the field.

    Attributes:
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, or `bias_word` for
            those of adapted layers.
    """

    bias: str
    bias_word: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the word."""
        require_bias(self.label, self.bias, self.bias_word)

    def trained_biases(self) -> str:
        """Return the biases of the base that `bias` chooses."""
        return self.bias if self.bias in ("none", "all") else "adapted"
