"""What a training step keeps, during a run: activations of blocks, and logits."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lightning_peft.activations.config import Activations
from lightning_peft.activations.limit import ActivationLimit, limit_activations
from lightning_peft.core.value_types import shown
from lightning_peft.losses.output_head import ChunkedLoss, chunk_losses

__all__ = ["LossForm", "StepMemory", "check_loss"]

LossForm = Literal["chunked"]


def check_loss(loss: object) -> None:
    """Raise ValueError unless `loss` is one of the forms, or None."""
    if loss not in ("chunked", None):
        raise ValueError(
            f"PEFT loss: expected 'chunked' or None, got {shown(loss)}; the loss itself is "
            "computed in training_step"
        )


class StepMemory:
    """The limits that one callback puts on a model for the time of a run.

    Args:
        activations: What blocks keep for backward; None for everything.
        loss: ``"chunked"`` for logits a few tokens at a time, or None.
    """

    def __init__(self, activations: Activations | None, loss: LossForm | None) -> None:
        self._activations, self._loss = activations, loss
        self._limit: ActivationLimit | None = None
        self._chunked: ChunkedLoss | None = None

    def install(self, root: nn.Module, *, predicts: bool = False) -> None:
        """Put the limits on a model whose adapters are attached.

        Args:
            root: The model.
            predicts: Whether the run predicts: its steps return logits, which are then computed.

        Raises:
            ValueError: the model has no blocks of the names given, or no output head.
        """
        self.remove()
        try:
            if self._activations is not None:
                self._limit = limit_activations(root, self._activations)
            if self._loss is not None and not predicts:
                self._chunked = chunk_losses(root)
        except ValueError:
            self.remove()
            raise

    def settle(self) -> None:
        """Follow blocks that were compiled after the adapters were attached."""
        if self._limit is not None:
            self._limit.settle()

    def remove(self) -> None:
        """Bring the model back to what it was."""
        if self._limit is not None:
            self._limit.remove()
        if self._chunked is not None:
            self._chunked.remove()
        self._limit = self._chunked = None

    def lines(self) -> list[str]:
        """Return lines for the report."""
        return [str(part) for part in (self._limit, self._chunked) if part is not None]
