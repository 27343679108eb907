"""Methods that add a small module to a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_peft.core.site import BlockSite
from lightning_peft.methods.base.method import Targeted

__all__ = ["BlockMethod"]


@dataclass(frozen=True)
class BlockMethod(Targeted):
    """Adds a small module after a layer or parallel to it."""

    mergeable: ClassVar[bool] = False

    @property
    def where(self) -> Literal["branches", "residual", "parallel", "attention"]:
        """Places in a transformer block that ``target_modules=None`` means.

        ``"branches"``: after attention and feed-forward; ``"residual"``: after the residual
        addition; ``"parallel"``: parallel to the feed-forward branch; ``"attention"``: in
        self-attention, whose queries meet the module's keys and values too.
        """
        return "branches"

    def module(self, site: BlockSite) -> nn.Module:
        """The added module, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    @property
    def top_layers(self) -> int | None:
        """Number of blocks, from the last one back, that it acts in; None for all."""
        return None

    def attention_prompt(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """With ``where="attention"``: positions [1, n, width], and the factor on what they add."""
        raise TypeError(f"{self.label}: expected a method with `attention_prompt`, found none")

    def change(self, module: nn.Module, x: Tensor, site: BlockSite) -> Tensor:
        """The addition to the output; x is the layer's output or input (see `BlockSite.role`)."""
        raise TypeError(f"{self.label}: expected a method with `change`, found none")
