"""Frozen weights of experts that a product casts or dequantises: how experts reach a buffer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_peft_kernels.block_scaled.expert_weights import BlockExperts
from lightning_peft_kernels.block_scaled.layout import BlockTensors
from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.dispatch import Backend, run
from lightning_peft_kernels.experts.groups import GroupLayout, Groups
from lightning_peft_kernels.experts.products import grouped_product, unassigned_rows
from lightning_peft_kernels.experts.selected import SelectedExperts
from lightning_peft_kernels.experts.selection import experts_detail, select_experts
from lightning_peft_kernels.launch import attempt
from lightning_peft_kernels.nf4 import cpu as nf4_cpu
from lightning_peft_kernels.nf4.ops import dequantize_4bit
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing

__all__ = ["FrozenWeight", "WeightSource"]


class FrozenWeight(NamedTuple):
    """A frozen W [E, N, K].

    Attributes:
        tensors: The dense weight alone, or the four parts of a `Packed4bit` or `BlockTensors`.
        packing: Layout of one packed expert; None for a dense weight. Its kind is ``"nf4"``,
            ``"fp4"`` or a `BlockLayout` as one word.
        backend: Requested backend.
    """

    tensors: tuple[Tensor | None, ...]
    packing: Packing | None
    backend: Backend

    def source(self) -> WeightSource:
        """Return the object that writes experts into a buffer."""
        if self.packing is None:
            (W,) = self.tensors
            assert W is not None  # a dense weight is one tensor
            return _CastWeight(W)
        packed, absmax, absmax2, offset = self.tensors
        assert packed is not None  # a packed weight has codes
        assert absmax is not None  # and scales
        if ":" in self.packing.kind:
            blocks = BlockTensors(packed, absmax, absmax2, offset)
            return BlockExperts(blocks, self.packing, self.backend)
        q = Packed4bit(packed, absmax, absmax2, offset)
        return _PackedWeight(q, self.packing, self.backend)


class WeightSource(Protocol):
    """Writes the weights of experts into a buffer."""

    experts: int
    N: int
    K: int

    def prepare(self, experts: list[int]) -> None:
        """Select the experts that `fill` will be called for."""

    def fill(self, out: Tensor, first: int) -> None:
        """Write selected experts from position `first` into out [n, N, K]."""

    def on_device(self, X: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
        """Compute the product without counts on the host."""
        ...


class _CastWeight:
    """A frozen dense W [E, N, K] in another dtype."""

    def __init__(self, W: Tensor) -> None:
        self.W = W.detach()
        self.experts, self.N, self.K = W.shape

    def prepare(self, experts: list[int]) -> None:
        """Select the experts that `fill` will be called for."""
        self._selected = SelectedExperts(experts, self.W.device)

    def fill(self, out: Tensor, first: int) -> None:
        """Cast selected experts from position `first` into out [n, N, K]."""
        out.copy_(self._selected.take(self.W, first, len(out)))

    def on_device(self, X: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
        """Cast all experts, then multiply."""
        W = self.W.to(X.dtype)
        return grouped_product(X, W if transposed else W.mT, _without_counts(groups))


class _PackedWeight:
    """A packed W."""

    def __init__(self, q: Packed4bit, packing: Packing, backend: Backend) -> None:
        self.q, self.backend = q, backend
        (self.N, self.K), self.kind, self.block_size = packing
        self.experts = q.packed.shape[0]

    def prepare(self, experts: list[int]) -> None:
        """Select experts and decode their scales, fp32.

        One call decodes all of them: a call costs as much as thousands of weights.
        """
        selected = SelectedExperts(experts, self.q.packed.device)
        n, (_, absmax, absmax2, offset) = len(experts), self.q
        scales = selected.take(absmax.flatten(1), 0, n)
        if absmax2 is not None and offset is not None:
            scales = _nested_scales(
                scales,
                selected.take(absmax2.flatten(1), 0, n),
                selected.take(offset.reshape(self.experts, 1), 0, n),
            )
        self._selected, self._scales = selected, scales

    def fill(self, out: Tensor, first: int) -> None:
        """Dequantise selected experts from position `first` into out [n, N, K]."""
        # Bytes of experts that are no neighbours are copied first, an eighth of what is written:
        # one call per expert costs as much as decoding it.
        packed = self._selected.take(self.q.packed, first, len(out))
        self._decode(packed, self._scales[first : first + len(out)], out)

    def _decode(self, packed: Tensor, scales: Tensor, out: Tensor) -> None:
        """Decode consecutive experts, in one call if blocks end with experts."""
        n, size = out.shape[0], self.N * self.K
        one_call = size % self.block_size == 0
        parts = [(packed, scales, out)] if one_call else zip(packed, scales, out, strict=True)
        shape = (n * self.N, self.K) if one_call else (self.N, self.K)
        for bits, scale, W in parts:
            q = Packed4bit(bits.reshape(-1), scale.reshape(-1), None, None)
            dequantize_4bit(
                q, shape, out.dtype, kind=self.kind, block_size=self.block_size,
                out=W.view(shape), backend=self.backend,
            )  # fmt: skip

    def on_device(self, X: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
        """Decode in the product, or dequantise the active experts first."""
        shape, ends = (self.N, self.K), groups.offsets

        def by_library() -> Tensor:
            W = self._active(X.dtype, ends)
            return grouped_product(X, W if transposed else W.mT, _without_counts(groups))

        def by_kernel() -> Tensor:
            from lightning_peft_kernels.experts.grouped_linear_triton import grouped_linear_4bit

            Y: Tensor = grouped_linear_4bit(
                X.contiguous(), self.q, shape, ends, self.kind, self.block_size,
                transposed=transposed,
            )  # fmt: skip
            if not groups.has_unassigned_rows:
                return Y
            return Y.masked_fill_(unassigned_rows(ends, X.shape[0]), 0.0)

        how = select_experts(X.device, X.dtype, groups.rows, self.experts, shape, self.backend)
        if how.backend == "dequantize":
            return by_library()
        detail, backend = experts_detail(groups.rows, self.experts), self.backend
        return attempt(
            "nf4_grouped_linear", X.dtype, detail, X.device, backend, by_kernel, by_library
        )

    def _active(self, dtype: torch.dtype, ends: Tensor) -> Tensor:
        """Return W [E, N, K] with the active experts written; all of them without a kernel."""
        device = self.q.packed.device
        self.prepare(list(range(self.experts)))
        W = torch.empty(self.experts, self.N, self.K, dtype=dtype, device=device)

        def by_kernel() -> Tensor:
            from lightning_peft_kernels.experts.dequantize_active_triton import (
                dequantize_active_experts,
            )

            packed = self.q.packed.reshape(self.experts, -1)
            return dequantize_active_experts(
                packed, self._scales, ends, self.kind, self.block_size, W
            )

        def one_by_one() -> Tensor:
            self.fill(W, 0)
            return W

        if self.N * self.K % self.block_size:  # a block ends inside an expert
            return one_by_one()
        return run("dequantize_experts", device, dtype, self.backend, by_kernel, one_by_one)


def _nested_scales(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Decode nested scales, fp32 [E, blocks]; every expert has groups of its own."""
    if codes.device.type == "cpu" and codes.shape[1] % 256 == 0:
        return nf4_cpu.block_scales(codes, absmax2, offset)
    second = absmax2.repeat_interleave(256, dim=1)[:, : codes.shape[1]]
    return dynamic_map(True, str(codes.device))[codes.int()].mul_(second).add_(offset)


def _without_counts(groups: Groups) -> GroupLayout:
    return GroupLayout(groups.offsets, groups.has_unassigned_rows, None)
