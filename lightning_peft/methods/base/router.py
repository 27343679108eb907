"""Methods that choose between other adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lightning_peft.core.site import RouterSite
from lightning_peft.methods.base.method import Targeted

__all__ = ["RouterMethod"]


@dataclass(frozen=True)
class RouterMethod(Targeted):
    """Says how much each of several adapters acts on a token, by a first pass without them."""

    mergeable: ClassVar[bool] = False

    def experts(self) -> Sequence[str]:
        """Names of the adapters, which are attached before."""
        raise TypeError(f"{self.label}: expected a method with `experts`, found none")

    def module(self, site: RouterSite) -> nn.Module:
        """The module that holds the trained tensors, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    def gates(self, module: nn.Module, hidden: Tensor, site: RouterSite) -> Tensor:
        """Factors [..., layers or 1, experts] from hidden states [..., width] of the first pass."""
        raise TypeError(f"{self.label}: expected a method with `gates`, found none")
