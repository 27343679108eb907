"""Rows sorted by expert: which rows belong to which expert.

The device knows the end of each group; the host reads it only if that needs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.experts.cpu_batches import ExpertBatches, batches_of
from lightning_peft_kernels.experts.row_blocks import RowBlocks, blocks_are_faster, cut_rows

__all__ = ["ActiveExperts", "GroupLayout", "Groups", "read_counts"]


class ActiveExperts:
    """Experts with at least one row, on the host.

    Attributes:
        experts: Their numbers, ascending.
        counts: Rows of each.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """Select experts from the number of rows of every expert."""
        pairs = [(e, n) for e, n in enumerate(counts) if n]
        self.experts = [e for e, _ in pairs]
        self.counts = [n for _, n in pairs]
        self._batches: dict[int, ExpertBatches] = {}

    def batches(self, most: int) -> ExpertBatches:
        """Return batches in slabs of at most `most` experts; computed once."""
        if most not in self._batches:
            self._batches[most] = batches_of(self.experts, self.counts, most)
        return self._batches[most]

    def split(self, X: Tensor) -> Sequence[Tensor]:
        """Split rows by expert, [n, ·] each; the last part holds the unassigned rows."""
        parts: Sequence[Tensor] = X.split([*self.counts, X.shape[0] - sum(self.counts)])
        return parts


class GroupLayout(NamedTuple):
    """Arguments of a grouped product.

    Attributes:
        offsets: End row of each expert, int32 [E].
        has_unassigned_rows: If True, rows may follow the last group.
        active: Experts with rows; None if the host does not count them.
    """

    offsets: Tensor
    has_unassigned_rows: bool
    active: ActiveExperts | None


class Groups:
    """Which rows belong to which expert.

    Attributes:
        offsets: End row of each expert, int32 [E].
        rows: Number of rows, including those beyond the last group.
        has_unassigned_rows: If True, rows may follow the last group.
    """

    def __init__(self, offsets: Tensor, rows: int, *, has_unassigned_rows: bool = False) -> None:
        self.offsets = offsets
        self.rows = rows
        self.has_unassigned_rows = has_unassigned_rows
        self._counts: list[int] | None = None
        self._active: ActiveExperts | None = None
        self._blocks: RowBlocks | None = None

    @classmethod
    def sorted(cls, expert: Tensor, experts: int, *, has_unassigned_rows: bool = False) -> Groups:
        """Build groups from the sorted expert of every row, int64 [S].

        A number of `experts` or more marks a row without an expert.
        """
        numbers = torch.arange(experts, device=expert.device)
        offsets = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        return cls(offsets, expert.shape[0], has_unassigned_rows=has_unassigned_rows)

    @classmethod
    def counted(cls, counts: Sequence[int], rows: int, device: torch.device) -> Groups:
        """Build groups from the number of rows of each expert.

        Raises:
            ValueError: The counts exceed the rows.
        """
        if sum(counts) > rows:
            raise ValueError(
                f"grouped_linear: expected counts of at most {rows} rows, got {sum(counts)}; "
                "count each row once"
            )
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        groups = cls(ends.to(device), rows, has_unassigned_rows=sum(counts) < rows)
        groups._counts = list(counts)
        return groups

    def times(self, n: int) -> Groups:
        """Repeat every row n times."""
        return Groups(self.offsets * n, self.rows * n, has_unassigned_rows=self.has_unassigned_rows)

    @property
    def on_host(self) -> bool:
        """Whether the host may read counts without a synchronisation."""
        return self.offsets.device.type == "cpu" and not torch.compiler.is_compiling()

    @property
    def layout(self) -> GroupLayout:
        """Arguments of a grouped product."""
        active = self.active if self.on_host else None
        return GroupLayout(self.offsets, self.has_unassigned_rows, active)

    def blocks(self, *factors: Tensor) -> RowBlocks | None:
        """Return blocks for products with these factors [E, ·, ·]; None unless they are faster."""
        cpu = self.offsets.device.type == "cpu"
        if self.has_unassigned_rows or not self.rows or not cpu or not self.on_host:
            return None
        rows_per_expert = self.rows // len(self.active.experts)
        if not blocks_are_faster(rows_per_expert, *factors):
            return None
        if self._blocks is None:
            self._blocks = cut_rows(self.sizes.long(), self.rows, rows_per_expert)
        return self._blocks

    @property
    def active(self) -> ActiveExperts:
        """Experts with at least one row, on the host."""
        if self._active is None:
            self._active = ActiveExperts(self.counts)
        return self._active

    @property
    def counts(self) -> list[int]:
        """Rows of each expert, on the host."""
        if self._counts is None:
            self._counts = read_counts(self.offsets)
        return self._counts

    @property
    def sizes(self) -> Tensor:
        """Rows of each expert, int32 [E] on the device."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))


def read_counts(offsets: Tensor) -> list[int]:
    """Read the rows of each expert to the host."""
    ends = offsets.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
