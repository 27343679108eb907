"""Eight nibbles per int32 word, in the orders of AWQ and GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AWQ_ORDER", "IN_ORDER", "from_nibbles", "nibbles"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))


def nibbles(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """[..., n] int32 → [..., 8 n], nibble i of a word at place ``order[i]``."""
    each = torch.stack([(words >> (4 * order.index(i))) & 15 for i in range(8)], dim=-1)
    return each.flatten(-2)


def from_nibbles(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Inverse of `nibbles`."""
    each = values.int().unflatten(-1, (-1, 8))
    shifts = torch.tensor([4 * order.index(i) for i in range(8)], device=values.device)
    words: Tensor = (each << shifts.int()).sum(-1, dtype=torch.int32)
    return words
