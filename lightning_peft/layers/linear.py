"""Linear layers: `nn.Linear` and its subclasses, and GPT-2's `Conv1D`, whose weight is [in,
out].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.layers.matrix import MatrixOps

__all__ = ["Conv1DOps", "LinearOps"]


class LinearOps(MatrixOps):
    """`nn.Linear`: weight [out, in], input [..., in]."""


class Conv1DOps(MatrixOps):
    """`transformers.pytorch_utils.Conv1D`: weight [in, out], input [..., in]."""

    def shape(self, m: nn.Module, name: str, natural: torch.Size) -> torch.Size:
        """Canonical [out, in]."""
        return torch.Size((natural[1], natural[0]))

    def to_matrix(self, m: nn.Module, name: str, W: Tensor) -> Tensor:
        """[in, out] → [out, in], a view."""
        return W.mT

    def from_matrix(self, m: nn.Module, name: str, M: Tensor) -> Tensor:
        """[out, in] → [in, out], a view."""
        return M.mT

    def op(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """X W + b."""
        return F.linear(x, W.mT, b)
