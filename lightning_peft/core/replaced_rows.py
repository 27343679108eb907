"""Some rows of an embedding, or of an output head, that act in place of the base's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ReplacedRows"]


@dataclass(frozen=True)
class ReplacedRows:
    """Rows of the vocabulary that act instead of the weight's own.

    Rows replace, they do not add: the weight's rows are neither read nor kept, and writing rows
    into a weight twice is the same as once.

    Attributes:
        rows: [k, width].
        ids: [k] int64, ascending: their places in the vocabulary.
        of_inputs: Whether the vocabulary is the input (an embedding) or the output (a head).
    """

    rows: Tensor
    ids: Tensor
    of_inputs: bool

    def matrix(self, W: Tensor) -> Tensor:
        """Return the canonical weight [out, in] with the rows in their places."""
        rows = self.rows.to(W.dtype)
        if self.of_inputs:
            return W.index_copy(-1, self.ids, rows.mT)
        return W.index_copy(-2, self.ids, rows)
