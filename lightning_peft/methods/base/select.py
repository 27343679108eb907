"""Methods that train parameters of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.methods.base.method import Targeted

__all__ = ["SelectMethod"]


@dataclass(frozen=True)
class SelectMethod(Targeted):
    """Trains a subset of the model's own parameters (on a copy: the base keeps its bits)."""

    may_be_empty: ClassVar[bool] = False

    #: Whether a normalisation layer's running statistics are copied with its parameters.
    copies_statistics: ClassVar[bool] = False

    def selects(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
        """Whether this parameter of `owner` is trained."""
        raise TypeError(f"{self.label}: expected a method with `selects`, found none")

    def choice(self, model: nn.Module) -> Callable[[str, nn.Parameter, nn.Module], bool]:
        """`selects`, for methods whose choice depends on the model."""
        return self.selects
