"""Methods that add positions to the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base.method import Targeted
from lightning_peft.methods.base.step import StepContext

__all__ = ["SequenceMethod"]


@dataclass(frozen=True)
class SequenceMethod(Targeted):
    """Adds positions to the sequence, at the model's boundary or in its attention.

    Attributes:
        insertion: ``"prepend"``: embeddings before the text; ``"add"``: added to the text's
            embeddings; ``"attention"``: keys and values before those of the text.
    """

    mergeable: ClassVar[bool] = False

    @property
    def insertion(self) -> Literal["prepend", "add", "attention"]:
        """Return the way in which the positions enter the model."""
        return "prepend"

    def module(self, site: SequenceSite) -> nn.Module:
        """The module that holds the trained tensors, initialised."""
        raise TypeError(f"{self.label}: expected a method with `module`, found none")

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """The positions: [n, width], or [n, keys and values of all layers]."""
        raise TypeError(f"{self.label}: expected a method with `prompt_embeddings`, found none")

    def prompts(
        self, module: nn.Module, site: SequenceSite, facts: Mapping[str, Tensor], batch: int
    ) -> Tensor:
        """The positions of a batch: `prompt_embeddings`, or [batch, n, width] if rows differ.

        Args:
            module: As in `prompt_embeddings`; so is `site`.
            facts: What is known about the samples, such as their task.
            batch: Rows of the batch.
        """
        return self.prompt_embeddings(module, site)

    @property
    def keeps_positions(self) -> bool:
        """Whether the output holds the positions of a prompt too."""
        return False

    @property
    def has_step_hooks(self) -> bool:
        """Whether `after_step` does anything."""
        return type(self).after_step is not SequenceMethod.after_step

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """None: no sequence method adds to the loss."""
        return None

    def after_backward(self, ctx: StepContext) -> None:
        """Called when gradients of a step are complete, before clipping."""

    def after_step(self, ctx: StepContext) -> None:
        """Called after the optimizer's step, gradients still there."""

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Make `prompt_embeddings` return `table`.

        Raises:
            ValueError: another shape, or a module that computes its embeddings.
        """
        raise ValueError(f"{self.label}: expected a method whose table can be set, found none")
