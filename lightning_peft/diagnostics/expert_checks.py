"""The kernels of experts against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from lightning_peft_kernels.dispatch import configuration, select
from lightning_peft_kernels.experts.selection import experts_detail, select_experts
from lightning_peft_kernels.lora.selection import rank_detail, select_one_pass
from lightning_peft_kernels.nf4.ops import Packed4bit
from lightning_peft_kernels.nf4.reference import dequantize_4bit_reference
from torch import Tensor

from lightning_peft.diagnostics.pairs import Pair, Shape, bits, close, packed_on, randn
from lightning_peft.diagnostics.trials import Check, Trial

__all__ = ["ExpertChecks"]

_EXPERTS = 4
_Found = Sequence[Tensor]


class ExpertChecks:
    """Checks of grouped products: a group of every size, one of them empty.

    Args:
        device: Where kernels run.
        dtype: Dtype of rows.
        shape: (N, K) of an expert; tokens are not used.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape

    def each(self) -> Iterator[Check]:
        """Yield the checks."""
        device, dtype, (N, K, _) = self.device, self.dtype, self.shape
        for rows in (8, 16, 32):
            yield Check(
                "nf4_grouped_linear",
                configuration(dtype, experts_detail(rows * _EXPERTS, _EXPERTS)),
                partial(self._products, rows),
                partial(select_experts, device, dtype, rows * _EXPERTS, _EXPERTS, (N, K)),
            )
        active = partial(select, "dequantize_experts", device, dtype)
        yield Check("dequantize_experts", configuration(dtype), self._dequantize, active)
        for op, trials in (
            ("expert_low_rank", self._low_rank),
            ("expert_rank_gradients", self._rank_gradients),
        ):
            for rank in (16, 32):
                decide = partial(select_one_pass, device, dtype, rank, None, op)
                name = configuration(dtype, rank_detail(rank))
                yield Check(op, name, partial(trials, rank), decide)

    def _counts(self, rows: int) -> list[int]:
        return [2 * rows - 3, 0, rows + 2, rows + 1]

    def _given(self, rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rows on the CPU, the expert of each, and the ends on the device."""
        counts = self._counts(rows)
        x = randn(sum(counts), width, seed=seed).to(self.dtype)
        expert = torch.repeat_interleave(torch.arange(_EXPERTS), torch.tensor(counts))
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=self.device)
        return x, expert, ends

    def _packed(self) -> tuple[Packed4bit, Tensor]:
        N, K, _ = self.shape
        pairs = [packed_on(self.device, N, K, True, seed) for seed in range(_EXPERTS)]
        W = torch.stack([dequantize_4bit_reference(q, (N, K), torch.float64) for q, _ in pairs])
        parts = zip(*(there for _, there in pairs), strict=True)
        return Packed4bit(*(torch.stack([t.reshape(-1) for t in ts]) for ts in parts)), W

    def _products(self, rows: int) -> Iterator[Trial]:
        from lightning_peft_kernels.experts.grouped_linear_triton import grouped_linear_4bit

        q, W = self._packed()
        for transposed in (True, False):
            x, expert, ends = self._given(rows, self.shape.K if transposed else self.shape.N)
            there, sums = x.to(self.device), "sk,snk->sn" if transposed else "sn,snk->sk"

            def run(
                there: Tensor = there, ends: Tensor = ends, turned: bool = transposed
            ) -> _Found:
                size = self.shape[:2]
                return (grouped_linear_4bit(there, q, size, ends, "nf4", 64, transposed=turned),)

            want = torch.einsum(sums, x.double(), W[expert])
            yield Trial(run, _closes(("y",) if transposed else ("dx",), want))

    def _dequantize(self) -> Iterator[Trial]:
        from lightning_peft_kernels.experts.dequantize_active_triton import (
            dequantize_active_experts,
        )

        N, K, _ = self.shape
        q, _ = packed_on(self.device, _EXPERTS * N, K, False)
        ends = torch.arange(1, _EXPERTS + 1, dtype=torch.int32, device=self.device)
        out = torch.empty(_EXPERTS, N, K, dtype=self.dtype, device=self.device)
        scales = q.absmax.reshape(_EXPERTS, -1).to(self.device)
        packed = q.packed.reshape(_EXPERTS, -1).to(self.device)
        yield Trial(
            lambda: (dequantize_active_experts(packed, scales, ends, "nf4", 64, out),),
            lambda found: [
                bits("W", found[0], dequantize_4bit_reference(q, (_EXPERTS, N, K), self.dtype))
            ],
        )

    def _low_rank(self, rank: int) -> Iterator[Trial]:
        from lightning_peft_kernels.experts.low_rank_triton import add_low_rank_product_

        Z, expert, ends = self._given(20, rank)
        y, B = self._given(20, self.shape.N, seed=1)[0], self._factor(rank)
        z, b, held = (t.to(self.device) for t in (Z, B, y))
        want = y.double() + torch.einsum("sr,snr->sn", Z.double(), B.double()[expert])
        yield Trial(
            lambda: (add_low_rank_product_(held.clone(), z, b, ends),), _closes(("y",), want)
        )

    def _rank_gradients(self, rank: int) -> Iterator[Trial]:
        from lightning_peft_kernels.experts.low_rank_triton import expert_low_rank_gradients

        dY, expert, ends = self._given(20, self.shape.N)
        Z, B = self._given(20, rank, seed=1)[0], self._factor(rank)
        dYd, Zd, Bd = (t.to(self.device) for t in (dY, Z, B))
        want = torch.zeros(_EXPERTS, self.shape.N, rank, dtype=torch.float64)
        want.index_add_(0, expert, torch.einsum("sn,sr->snr", dY.double(), Z.double()))
        first = 0.5 * torch.einsum("sn,snr->sr", dY.double(), B.double()[expert])
        yield Trial(
            lambda: expert_low_rank_gradients(dYd, Zd, Bd, ends, 0.5),
            _closes(("dZ", "dB"), first, want),
        )

    def _factor(self, rank: int) -> Tensor:
        return randn(_EXPERTS * self.shape.N, rank, seed=2).view(_EXPERTS, -1, rank).to(self.dtype)


def _closes(names: Sequence[str], *wanted: Tensor) -> Callable[[_Found], list[Pair]]:
    def compare(found: _Found) -> list[Pair]:
        return [close(*each) for each in zip(names, found, wanted, strict=True)]

    return compare
