"""Block-diagonal linear layers: DeepSeek-V4's output projection, a matrix per group of heads.

    y[..., g, :] = W[g] x[..., g, :]        W [groups · out, in], x [..., groups, in]

The input of an edit's terms is that of a group, so A is shared by the groups, and B has their rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.protocols import WeightLayout
from lightning_peft.layers.base import MatrixOps
from lightning_peft.storage.packed_linear import AdoptedLinear, PackedLinear

__all__ = ["GroupedLinearOps"]


class GroupedLinearOps(MatrixOps):
    """Weight [groups · out, in], input [..., groups, in], output [..., groups, out]."""

    # A rotation of the input would do; but a kind that has it is taken for one plain product.
    on_activations = frozenset({"in_scale", "out_scale"})
    is_linear = True

    def weight_layout(self, m: nn.Module) -> WeightLayout | None:
        """One weight [groups · out, in]."""
        return WeightLayout(("weight",), False, PackedLinear, AdoptedLinear)

    def functional(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The product of each group with its rows of W."""
        y = _by_group(m, x, W)
        return y if b is None else y + self.per_output(m, b)

    def low_rank(
        self, m: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        """`scaling · x Aᵀ`, then each group with its rows of B."""
        return _by_group(m, nn.functional.linear(x, A) * scaling, B)

    def per_output(self, m: nn.Module, v: Tensor) -> Tensor:
        """[groups, out]."""
        return v.view(_groups(m), -1)


def _groups(m: Any) -> int:
    return int(m.n_groups)


def _by_group(m: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    return torch.einsum("...gk,gnk->...gn", x, W.view(_groups(m), -1, W.shape[-1]))
