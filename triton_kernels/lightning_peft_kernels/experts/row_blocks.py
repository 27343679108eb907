"""Rows of experts cut into blocks of one height, for products with many small weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.malloc import keep_freed

__all__ = ["RowBlocks", "blocks_are_faster", "cut_rows"]

# By bytes per element: elements of one expert's factor, and mean rows per expert, up to which
# `RowBlocks` cost less than one product per expert. Measured on 2 CPU threads with 16 to 128
# experts, ranks 8 to 128, 256 to 4096 features: within these limits 0.15 to 1.0 of the time in both
# directions, beyond them up to 5.
_LIMITS = {2: (1 << 15, 128), 4: (1 << 13, 48), 8: (1 << 13, 48)}


class RowBlocks(NamedTuple):
    """Rows of experts cut into blocks of one height.

    Many small products become one batched product over blocks. It costs padding rows and one copy
    of the weight per block; for low-rank factors this is a fraction of the calls saved. Padding
    repeats the expert's own last row, so non-finite values stay with their expert.

    Attributes:
        height: Rows per block.
        expert: Expert of each block, int64 [blocks].
        row: Source row of each slot, int64 [blocks · height].
        padding: If True, the slot is padding; bool [blocks, height, 1].
        position: Slot of each row, int64 [S].
    """

    height: int
    expert: Tensor
    row: Tensor
    padding: Tensor
    position: Tensor

    def cut(self, X: Tensor) -> Tensor:
        """Gather [S, K] into [blocks, height, K]."""
        rows: Tensor = X.index_select(0, self.row)
        return rows.view(-1, self.height, X.shape[1])

    def joined(self, Y: Tensor) -> Tensor:
        """Gather [blocks, height, N] into [S, N]."""
        return Y.flatten(0, 1).index_select(0, self.position)

    def weights(self, W: Tensor) -> Tensor:
        """Gather [E, N, K] into [blocks, N, K]."""
        return W.index_select(0, self.expert)

    def summed(self, dW: Tensor, experts: int) -> Tensor:
        """Sum [blocks, N, K] per expert into [E, N, K]."""
        keep_freed()
        total: Tensor = dW.new_zeros(experts, *dW.shape[1:]).index_add_(0, self.expert, dW)
        return total


def blocks_are_faster(rows_per_expert: int, *factors: Tensor) -> bool:
    """Whether blocks beat one product per expert for factors [E, ·, ·] on a CPU."""
    most_elements, most_rows = _LIMITS[factors[0].element_size()]
    return rows_per_expert <= most_rows and all(t[0].numel() <= most_elements for t in factors)


def cut_rows(sizes: Tensor, rows: int, rows_per_expert: int) -> RowBlocks:
    """Cut rows into blocks about as high as the mean expert.

    Args:
        sizes: Rows of each expert, int64 [E].
        rows: Their sum.
        rows_per_expert: Mean over the experts with rows.
    """
    height = 1 << min(max(2, (rows_per_expert * 3 // 2).bit_length() - 1), 5)
    blocks = (sizes + (height - 1)) // height
    expert = torch.repeat_interleave(blocks)
    ends = sizes.cumsum(0)
    shift = (blocks.cumsum(0) - blocks) * height - (ends - sizes)
    position = torch.arange(rows) + shift[torch.repeat_interleave(sizes, output_size=rows)]
    row = torch.arange(len(expert) * height).view(-1, height) - shift[expert, None]
    last = ends[expert, None] - 1
    padding = (row > last).unsqueeze(-1)
    return RowBlocks(height, expert, row.minimum(last).flatten(), padding, position)
