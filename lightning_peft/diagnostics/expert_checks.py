"""The kernels of experts against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

import torch
from lightning_peft_kernels.dispatch import Decision, select
from lightning_peft_kernels.experts.selection import experts_detail, select_experts
from lightning_peft_kernels.lora.selection import rank_detail, select_one_pass
from lightning_peft_kernels.nf4.ops import Packed4bit
from lightning_peft_kernels.nf4.reference import dequantize_4bit_reference
from torch import Tensor

from lightning_peft.diagnostics.pairs import Pair, Shape, bits, close, packed_on, randn

__all__ = ["ExpertChecks"]

_EXPERTS = 4
Found = tuple[str, str, Callable[[], list[Pair]], Callable[[], Decision]]


class ExpertChecks:
    """Checks of grouped products: a group of every size, one of them empty.

    Args:
        device: Where kernels run.
        dtype: Dtype of rows.
        shape: (N, K) of an expert; tokens are not used.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape

    def each(self) -> Iterator[Found]:
        """Yield (op, detail of the configuration, run, decision)."""
        device, dtype, (N, K, _) = self.device, self.dtype, self.shape
        for rows in (8, 16, 32):
            yield (
                "nf4_grouped_linear",
                experts_detail(rows * _EXPERTS, _EXPERTS),
                partial(self._products, rows),
                partial(select_experts, device, dtype, rows * _EXPERTS, _EXPERTS, (N, K)),
            )
        active = partial(select, "dequantize_experts", device, dtype)
        yield "dequantize_experts", "", self._dequantize, active
        for op, run in (
            ("expert_low_rank", self._low_rank),
            ("expert_rank_gradients", self._rank_gradients),
        ):
            for rank in (16, 32):
                decide = partial(select_one_pass, device, dtype, rank, None, op)
                yield op, rank_detail(rank), partial(run, rank), decide

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

    def _products(self, rows: int) -> list[Pair]:
        from lightning_peft_kernels.experts.grouped_linear_triton import grouped_linear_4bit

        q, W = self._packed()
        found = []
        for transposed in (True, False):
            x, expert, ends = self._given(rows, self.shape.K if transposed else self.shape.N)
            y = grouped_linear_4bit(
                x.to(self.device), q, self.shape[:2], ends, "nf4", 64, transposed=transposed
            )
            sums = "sk,snk->sn" if transposed else "sn,snk->sk"
            want = torch.einsum(sums, x.double(), W[expert])
            found.append(close("y" if transposed else "dx", y, want))
        return found

    def _dequantize(self) -> list[Pair]:
        from lightning_peft_kernels.experts.grouped_linear_triton import dequantize_active_experts

        N, K, _ = self.shape
        q, _ = packed_on(self.device, _EXPERTS * N, K, False)
        ends = torch.arange(1, _EXPERTS + 1, dtype=torch.int32, device=self.device)
        out = torch.empty(_EXPERTS, N, K, dtype=self.dtype, device=self.device)
        scales = q.absmax.reshape(_EXPERTS, -1).to(self.device)
        packed = q.packed.reshape(_EXPERTS, -1).to(self.device)
        W = dequantize_active_experts(packed, scales, ends, "nf4", 64, out)
        return [bits("W", W, dequantize_4bit_reference(q, (_EXPERTS, N, K), self.dtype))]

    def _low_rank(self, rank: int) -> list[Pair]:
        from lightning_peft_kernels.experts.low_rank_triton import add_low_rank_product_

        Z, expert, ends = self._given(20, rank)
        y, B = self._given(20, self.shape.N, seed=1)[0], self._factor(rank)
        got = add_low_rank_product_(
            y.to(self.device, copy=True), Z.to(self.device), B.to(self.device), ends
        )
        want = y.double() + torch.einsum("sr,snr->sn", Z.double(), B.double()[expert])
        return [close("y", got, want)]

    def _rank_gradients(self, rank: int) -> list[Pair]:
        from lightning_peft_kernels.experts.low_rank_triton import expert_low_rank_gradients

        dY, expert, ends = self._given(20, self.shape.N)
        Z, B = self._given(20, rank, seed=1)[0], self._factor(rank)
        dZ, dB = expert_low_rank_gradients(
            dY.to(self.device), Z.to(self.device), B.to(self.device), ends, 0.5
        )
        want = torch.zeros(_EXPERTS, self.shape.N, rank, dtype=torch.float64)
        want.index_add_(0, expert, torch.einsum("sn,sr->snr", dY.double(), Z.double()))
        first = 0.5 * torch.einsum("sn,snr->sr", dY.double(), B.double()[expert])
        return [close("dZ", dZ, first), close("dB", dB, want)]

    def _factor(self, rank: int) -> Tensor:
        return randn(_EXPERTS * self.shape.N, rank, seed=2).view(_EXPERTS, -1, rank).to(self.dtype)
