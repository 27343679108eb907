"""Rows grouped by expert, and the library's product over such groups.

Where groups end is known on the device; the host reads it only where that costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft_kernels.experts.cpu_batches import Slabs, slabs_of
from lightning_peft_kernels.experts.cpu_pairs import in_pairs, pays_in_pairs
from lightning_peft_kernels.malloc import keep_freed

__all__ = [
    "Blocks",
    "Groups",
    "Used",
    "count_on_host",
    "gradient",
    "library_gradient",
    "library_product",
    "outside",
    "product",
]

#: By bytes an element: elements of one expert's factor and rows of a mean expert up to which
#: `Blocks` cost less than products expert by expert. Measured on 2 CPU threads with 16 to 128
#: experts, ranks 8 to 128, 256 to 4096 features: within it 0.15 to 1.0 of the time both ways,
#: beyond it up to 5.
_BLOCKS = {2: (1 << 15, 128), 4: (1 << 13, 48), 8: (1 << 13, 48)}

#: Experts for each that has rows from which the library's product costs more than one for each of
#: those: 0.2 to 1.0 of its time, gradients too (2 threads, fp32 and bf16, 16 to 256 experts of
#: 128 × 64 and 256 × 256).
_IDLE = 4

_on_host: list[bool | None] = [None]


def count_on_host(setting: bool | None) -> bool | None:
    """Whether rows are counted on the host; None means on a CPU alone. Returns what was set."""
    before = _on_host[0]
    _on_host[0] = setting
    return before


class Blocks(NamedTuple):
    """Rows of experts cut into blocks of one height.

    Many small products become one batched product over blocks, at the cost of filling up and of a
    weight for each block: for factors of low rank a fraction of the calls saved. An expert's last
    block is filled up with its last row, never another expert's: what is not finite stays there.
    """

    #: Rows of a block.
    height: int
    #: int64 [blocks], the expert of each.
    expert: Tensor
    #: int64 [blocks · height], the row that stands there.
    row: Tensor
    #: bool [blocks, height, 1], whether it fills up.
    filler: Tensor
    #: int64 [S], where each row stands.
    place: Tensor

    def cut(self, X: Tensor) -> Tensor:
        """[S, K] as [blocks, height, K]."""
        rows: Tensor = X.index_select(0, self.row)
        return rows.view(-1, self.height, X.shape[1])

    def joined(self, Y: Tensor) -> Tensor:
        """[blocks, height, N] as [S, N]."""
        return Y.flatten(0, 1).index_select(0, self.place)

    def of_each(self, W: Tensor) -> Tensor:
        """[E, N, K] as [blocks, N, K]."""
        return W.index_select(0, self.expert)

    def summed(self, dW: Tensor, experts: int) -> Tensor:
        """[blocks, N, K] as [E, N, K]."""
        keep_freed()
        total: Tensor = dW.new_zeros(experts, *dW.shape[1:]).index_add_(0, self.expert, dW)
        return total


class Used:
    """Experts that have rows, on the host.

    Attributes:
        experts: Their numbers, ascending.
        counts: How many rows each has.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """From the rows of every expert."""
        pairs = [(e, n) for e, n in enumerate(counts) if n]
        self.experts = [e for e, _ in pairs]
        self.counts = [n for _, n in pairs]
        self._slabs: dict[int, Slabs] = {}

    def slabs(self, most: int) -> Slabs:
        """That many at once."""
        if most not in self._slabs:
            self._slabs[most] = slabs_of(self.experts, self.counts, most)
        return self._slabs[most]

    def split(self, X: Tensor) -> Sequence[Tensor]:
        """Rows of each [n, ·]; at the end those of nobody."""
        parts: Sequence[Tensor] = X.split([*self.counts, X.shape[0] - sum(self.counts)])
        return parts


class Groups:
    """Which rows belong to which expert.

    Attributes:
        offsets: int32 [E], the end row of each expert.
        rows: Number of rows, those beyond the last group included.
        tail: Whether there may be such rows.
    """

    def __init__(self, offsets: Tensor, rows: int, *, tail: bool = False) -> None:
        self.offsets = offsets
        self.rows = rows
        self.tail = tail
        self._counts: list[int] | None = None
        self._used: Used | None = None
        self._blocks: Blocks | None = None

    @classmethod
    def sorted(cls, expert: Tensor, experts: int, *, tail: bool = False) -> Groups:
        """From the sorted expert of every row, int64 [S]; numbers beyond are nobody's."""
        numbers = torch.arange(experts, device=expert.device)
        offsets = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        return cls(offsets, expert.shape[0], tail=tail)

    @classmethod
    def counted(cls, counts: Sequence[int], rows: int, device: torch.device) -> Groups:
        """From the number of rows of each expert.

        Raises:
            ValueError: more rows are counted than there are.
        """
        if sum(counts) > rows:
            raise ValueError(
                f"grouped_linear: expected counts of at most {rows} rows, got {sum(counts)}; "
                "count each row once"
            )
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        groups = cls(ends.to(device), rows, tail=sum(counts) < rows)
        groups._counts = list(counts)
        return groups

    def times(self, n: int) -> Groups:
        """Every row as n rows."""
        return Groups(self.offsets * n, self.rows * n, tail=self.tail)

    @property
    def on_host(self) -> bool:
        """Whether counts may be read here without a synchronisation."""
        setting = _on_host[0]
        if setting is not None:
            return setting
        return self.offsets.device.type == "cpu" and not torch.compiler.is_compiling()

    @property
    def given(self) -> tuple[Tensor, bool, Used | None]:
        """(offsets, tail, experts with rows where that may be read): what `product` takes."""
        return self.offsets, self.tail, self.used if self.on_host else None

    def blocks(self, *factors: Tensor) -> Blocks | None:
        """For products with these factors [E, ·, ·], on a CPU, where it pays; else None."""
        cpu = self.offsets.device.type == "cpu"
        if self.tail or not self.rows or not cpu or not self.on_host:
            return None
        most, mean = _BLOCKS[factors[0].element_size()]
        rows_each = self.rows // len(self.used.experts)
        if rows_each > mean or any(t[0].numel() > most for t in factors):
            return None
        if self._blocks is None:
            self._blocks = _blocks(self.sizes.long(), self.rows, rows_each)
        return self._blocks

    @property
    def used(self) -> Used:
        """Experts that have rows, on the host."""
        if self._used is None:
            self._used = Used(self.counts)
        return self._used

    @property
    def counts(self) -> list[int]:
        """Rows of each expert, on the host."""
        if self._counts is None:
            self._counts = _read(self.offsets)
        return self._counts

    @property
    def sizes(self) -> Tensor:
        """Rows of each expert, int32 [E] on the device."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))


def _blocks(n: Tensor, rows: int, rows_each: int) -> Blocks:
    """About as high as an expert that has rows has on average; n int64 [E] are those of each."""
    height = 1 << min(max(2, (rows_each * 3 // 2).bit_length() - 1), 5)
    each = (n + (height - 1)) // height
    expert = torch.repeat_interleave(each)
    ends = n.cumsum(0)
    shift = (each.cumsum(0) - each) * height - (ends - n)
    place = torch.arange(rows) + shift[torch.repeat_interleave(n, output_size=rows)]
    row = torch.arange(len(expert) * height).view(-1, height) - shift[expert, None]
    last = ends[expert, None] - 1
    return Blocks(height, expert, row.minimum(last).flatten(), (row > last).unsqueeze(-1), place)


def product(X: Tensor, W: Tensor, offsets: Tensor, tail: bool, used: Used | None) -> Tensor:
    """X[rows of e] · W[e]ᵀ, W [E, N, K]: on a CPU two experts at once where that is faster; else by
    the library, expert by expert where most have no rows and in what it does not take. `used` is
    None where rows are not counted on the host.
    """
    if used is not None and pays_in_pairs(X, W, len(used.experts)):
        return in_pairs(X, W.mT, used.slabs(2))
    aligned = used is None or not _unaligned(X, W)
    if X.dtype != torch.float64 and aligned and not _mostly_idle(X, W.shape[0], used):
        return library_product(X, W, offsets, tail=tail)
    used = used or Used(_read(offsets))
    (*rows, nobodys), across = used.split(X), W.mT
    if torch.is_grad_enabled():  # what is written into cannot be recorded
        parts = [torch.mm(x, across[e]) for e, x in zip(used.experts, rows, strict=True)]
        return torch.cat([*parts, X.new_zeros(len(nobodys), W.shape[1])])
    Y = X.new_empty(X.shape[0], W.shape[1])
    *each, rest = used.split(Y)
    for e, x, y in zip(used.experts, rows, each, strict=True):
        torch.mm(x, across[e], out=y)
    rest.zero_()
    return Y


def gradient(dY: Tensor, X: Tensor, offsets: Tensor, used: Used | None) -> Tensor:
    """dW [E, N, K] = dY[rows of e]ᵀ X[rows of e], as `product`; zero for an expert without rows."""
    unit, experts = 16 // X.element_size(), offsets.shape[0]
    whole = not (dY.shape[1] % unit or X.shape[1] % unit)
    taken = X.dtype != torch.float64 and (used is None or whole)
    if taken and not _mostly_idle(X, experts, used):
        return library_gradient(dY, X, offsets)
    used = used or Used(_read(offsets))
    pairs = zip(used.split(dY), used.split(X), strict=True)
    if torch.is_grad_enabled():
        dW = {e: torch.mm(g.mT, x) for e, (g, x) in zip(used.experts, pairs, strict=False)}
        none = X.new_zeros(dY.shape[1], X.shape[1])
        return torch.stack([dW.get(e, none) for e in range(experts)])
    total = X.new_zeros(experts, dY.shape[1], X.shape[1])
    for e, (g, x) in zip(used.experts, pairs, strict=False):
        torch.mm(g.mT, x, out=total[e])
    return total


def _mostly_idle(X: Tensor, experts: int, used: Used | None) -> bool:
    """Whether the library, which goes through all experts, loses more by those without rows than it
    gains by going from one to the next itself. Not where the product is recorded.
    """
    if used is None or torch.is_grad_enabled() or X.device.type != "cpu":
        return False
    return experts >= len(used.experts) * _IDLE


def _read(offsets: Tensor) -> list[int]:
    ends = offsets.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def outside(offsets: Tensor, rows: int) -> Tensor:
    """[S, 1] whether a row belongs to no expert."""
    row = torch.arange(rows, device=offsets.device)
    return (row >= offsets[-1]).unsqueeze(-1)


def library_product(X: Tensor, W: Tensor, offsets: Tensor, *, tail: bool) -> Tensor:
    """X [S, K] times W [E, N, K] by `grouped_mm`, padded to rows of whole 16 bytes where needed.

    Rows of nobody (`tail`) are zero.
    """
    N, K = W.shape[1:]
    unit = 16 // X.element_size()
    if K % unit:
        X, W = F.pad(X, (0, -K % unit)), F.pad(W, (0, -K % unit))
    if N % unit:
        W = F.pad(W, (0, 0, 0, -N % unit))
    Y = _grouped_mm(X.contiguous(), W.mT, offsets)
    if N % unit:
        Y = Y[:, :N]
    return Y.masked_fill_(outside(offsets, X.shape[0]), 0.0) if tail else Y


def library_gradient(dY: Tensor, X: Tensor, offsets: Tensor) -> Tensor:
    """dW [E, N, K] = dY[rows of e]ᵀ X[rows of e]; zero for an expert without rows."""
    (S, N), K = dY.shape, X.shape[1]
    unit = 16 // X.element_size()
    dY, X = F.pad(dY, (0, -N % unit)), F.pad(X, (0, -K % unit))
    # The rows of a group are summed over: pad to whole 16 bytes of the transposed operand too.
    dY, X = (F.pad(t, (0, 0, 0, -S % unit)) for t in (dY, X))
    dW = _grouped_mm(dY.mT, X, offsets)[:, :N, :K]
    if dW.device.type == "cuda":  # only the CPU's product is known to write zeros
        empty = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
        dW = dW.masked_fill(empty[:, None, None], 0.0)
    return dW


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """The library's product. Its rule for shapes without values knows bf16 alone, where the product
    itself takes other dtypes too: there ours stands for it.
    """
    if torch.compiler.is_compiling() or a.is_meta or type(a).__name__ == "FakeTensor":
        y: Tensor = torch.ops.lightning_peft.grouped_mm(a, b, offsets)
        return y
    return F.grouped_mm(a, b, offs=offsets)


_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define("grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor")


def _grouped_mm_impl(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=offsets)


def _grouped_mm_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])


_library.impl("grouped_mm", _grouped_mm_impl, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_peft::grouped_mm", _grouped_mm_fake, lib=_library)


def _unaligned(X: Tensor, W: Tensor) -> bool:
    """Whether rows of the product's operands are no multiples of 16 bytes."""
    unit = 16 // X.element_size()
    return any(n % unit for n in W.shape[1:])
