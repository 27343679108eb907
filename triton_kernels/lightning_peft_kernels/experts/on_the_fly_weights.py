"""Grouped products with weights that are made for them: packed ones, or dense ones to be cast.

On the host experts that have rows are made a few at a time in one buffer, forward and backward
alike. Where only the device knows which have rows, a packed weight is decoded in the product; with
many rows an expert those that are used are made in one buffer for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import applied
from lightning_peft_kernels.codebooks.eight_bit import dynamic_map
from lightning_peft_kernels.dispatch import choose, choose_experts
from lightning_peft_kernels.experts.cpu_batches import Slabs
from lightning_peft_kernels.experts.groups import Groups, outside, product
from lightning_peft_kernels.nf4 import cpu as nf4_cpu
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit
from lightning_peft_kernels.nf4.weight_buffers import thread_buffer

__all__ = ["MadeByExpert"]

#: Elements of the buffer that experts are made in on a CPU: small ones share the cost of a call and
#: stay in the cache (twice as many took 1.01 to 1.06 of a step's time, a quarter 1.01 to 1.04).
#: Never more than a quarter of the experts.
_BUFFER = 1 << 20
#: Experts of a slab, and by bytes an element rows of a mean expert, from and up to which batched
#: products pay for their order: 0.8 to 1.03 of the time in fp32, 0.5 to 0.6 in bf16 (2 threads, 64
#: and 256 experts of 256 × 256 and 256 × 128).
_SIDE_BY_SIDE = 4
_FEW_ROWS = {2: 32, 4: 24, 8: 24}


class _Wanted:
    """Experts that are asked for."""

    def __init__(self, experts: list[int], device: torch.device) -> None:
        self.experts = experts
        self.index = torch.tensor(experts, device=device)

    def of(self, t: Tensor, first: int, n: int) -> Tensor:
        """What t holds of n of them, from the first-th on; a view where they are neighbours."""
        low = self.experts[first]
        if self.experts[first : first + n] == list(range(low, low + n)):
            return t[low : low + n]
        return t.index_select(0, self.index[first : first + n])


class _Cast:
    """A frozen dense W [E, N, K] in another dtype."""

    def __init__(self, W: Tensor) -> None:
        self.W = W.detach()
        self.experts, self.N, self.K = W.shape

    def prepare(self, wanted: list[int]) -> None:
        """Note which experts `fill` is asked for."""
        self._wanted = _Wanted(wanted, self.W.device)

    def fill(self, out: Tensor, first: int) -> None:
        """W of the wanted experts from the first-th on into out [n, N, K]."""
        out.copy_(self._wanted.of(self.W, first, len(out)))

    def on_device(self, X: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
        """The product without counts on the host."""
        W = self.W.to(X.dtype)
        return product(X, W if transposed else W.mT, groups.offsets, groups.tail, None)


class _Packed:
    """A packed W."""

    def __init__(self, q: Packed4bit, packing: tuple[tuple[int, int], str, int]) -> None:
        self.q = q
        (self.N, self.K), self.kind, self.block_size = packing
        self.experts = q.packed.shape[0]

    def prepare(self, wanted: list[int]) -> None:
        """Scales fp32 of the experts that `fill` is asked for, at once: a call costs as much as
        thousands of weights.
        """
        self._wanted = _Wanted(wanted, self.q.packed.device)
        absmax, absmax2, offset = (
            None if t is None else self._wanted.of(t.flatten(1), 0, len(wanted))
            for t in self._scaling()
        )
        self._scales = _scales(absmax, absmax2, offset)  # type: ignore[arg-type]

    def _scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        E, q = self.experts, self.q
        if q.absmax2 is None or q.offset is None:
            return q.absmax, None, None
        return q.absmax, q.absmax2, q.offset.reshape(E, 1)

    def fill(self, out: Tensor, first: int) -> None:
        """W of the wanted experts from the first-th on into out [n, N, K]."""
        # Where they are no neighbours their bytes are copied, an eighth of what is written: a call
        # for each costs as much as it decodes.
        packed = self._wanted.of(self.q.packed, first, len(out))
        self._decode(packed, self._scales[first : first + len(out)], out)

    def _decode(self, packed: Tensor, scales: Tensor, out: Tensor) -> None:
        """Experts that lie one behind the other: one call where blocks end with experts."""
        n, size = out.shape[0], self.N * self.K
        together = size % self.block_size == 0
        parts = [(packed, scales, out)] if together else zip(packed, scales, out, strict=True)
        shape = (n * self.N, self.K) if together else (self.N, self.K)
        for bits, scale, W in parts:
            q = Packed4bit(bits.reshape(-1), scale.reshape(-1), None, None)
            dequantize_4bit(
                q, shape, out.dtype, kind=self.kind, block_size=self.block_size, out=W.view(shape)
            )

    def on_device(self, X: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
        """The product without counts on the host."""
        shape, ends = (self.N, self.K), groups.offsets
        how = choose_experts(X.device, X.dtype, groups.rows, self.experts, shape)
        if how.backend == "dequantize":
            W = self._used(X.dtype, ends)
            return product(X, W if transposed else W.mT, ends, groups.tail, None)
        from lightning_peft_kernels.experts.grouped_linear_triton import grouped_decode

        Y: Tensor = grouped_decode(
            X.contiguous(), self.q, shape, ends, self.kind, self.block_size, transposed=transposed
        )
        return Y.masked_fill_(outside(ends, X.shape[0]), 0.0) if groups.tail else Y

    def _used(self, dtype: torch.dtype, ends: Tensor) -> Tensor:
        """W [E, N, K] of experts that have rows; of all where no kernel can tell."""
        device = self.q.packed.device
        self.prepare(list(range(self.experts)))
        W = torch.empty(self.experts, self.N, self.K, dtype=dtype, device=device)
        whole_blocks = self.N * self.K % self.block_size == 0
        if whole_blocks and choose("dequantize_4bit", device, dtype).backend == "triton":
            from lightning_peft_kernels.experts.grouped_linear_triton import dequantize_used

            packed = self.q.packed.reshape(self.experts, -1)
            return dequantize_used(packed, self._scales, ends, self.kind, self.block_size, W)
        self.fill(W, 0)
        return W


def _scales(codes: Tensor, absmax2: Tensor | None, offset: Tensor | None) -> Tensor:
    """fp32 [E, blocks]; nested ones are those of each expert by itself."""
    if absmax2 is None or offset is None:
        return codes
    if codes.device.type == "cpu" and codes.shape[1] % 256 == 0:
        return nf4_cpu.scales(codes, absmax2, offset)
    second = absmax2.repeat_interleave(256, dim=1)[:, : codes.shape[1]]
    return dynamic_map(True, str(codes.device))[codes.int()].mul_(second).add_(offset)


def _weights(packing: Any, tensors: Sequence[Tensor | None]) -> _Cast | _Packed:
    if packing is None:
        return _Cast(tensors[0])  # type: ignore[arg-type]
    return _Packed(Packed4bit(*tensors), packing)  # type: ignore[arg-type]


class MadeByExpert(torch.autograd.Function):
    """X W[e]ᵀ, or X W[e] unless `transposed`, with weights that are made for the product.

    Inputs: X [S, K]; its groups; (shape, kind, block_size) of a packed weight, None for a dense
    one; whether W is transposed; the weight's tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, groups: Groups, packing: Any, transposed: bool, *tensors: Tensor | None
    ) -> Tensor:
        """Y [S, N]."""
        ctx.save_for_backward(*tensors)
        ctx.groups, ctx.packing, ctx.transposed = groups, packing, transposed
        return _product(X, groups, packing, tensors, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        """DX alone, the same product the other way: the weight is frozen. Where it is recorded
        (create_graph), what is recorded makes its weights again.
        """
        dX, tensors = None, ctx.saved_tensors  # read once: under a checkpoint they are made again
        if ctx.needs_input_grad[0]:
            made = ctx.packing, not ctx.transposed, *tensors
            dX = applied(MadeByExpert, dY.contiguous(), ctx.groups, *made)
        return dX, None, None, None, *[None] * len(tensors)


def _product(
    X: Tensor, groups: Groups, packing: Any, tensors: Sequence[Tensor | None], *, transposed: bool
) -> Tensor:
    if torch.compiler.is_compiling():  # as one op: what it does depends on how rows are routed
        shape, kind, block_size = packing or (tensors[0].shape[1:], "", 0)  # type: ignore[union-attr]
        y: Tensor = torch.ops.lightning_peft.made_by_expert(
            X, groups.offsets, groups.tail, tensors, list(shape), kind, block_size, transposed
        )
        return y
    return _with_made(X, groups, _weights(packing, tensors), transposed=transposed)


_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define(
    "made_by_expert(Tensor X, Tensor offsets, bool tail, Tensor?[] tensors, SymInt[] shape, str "
    "kind, int block_size, bool transposed) -> Tensor"
)


def _made_impl(
    X: Tensor,
    offsets: Tensor,
    tail: bool,
    tensors: Sequence[Tensor | None],
    shape: Sequence[int],
    kind: str,
    block_size: int,
    transposed: bool,
) -> Tensor:
    packing = ((shape[0], shape[1]), kind, block_size) if kind else None
    groups = Groups(offsets, X.shape[0], tail=tail)
    return _with_made(X, groups, _weights(packing, tensors), transposed=transposed)


def _made_fake(
    X: Tensor,
    offsets: Tensor,
    tail: bool,
    tensors: Sequence[Tensor | None],
    shape: Sequence[int],
    kind: str,
    block_size: int,
    transposed: bool,
) -> Tensor:
    return X.new_empty(X.shape[0], shape[0] if transposed else shape[1])


_library.impl("made_by_expert", _made_impl, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_peft::made_by_expert", _made_fake, lib=_library)


def _with_made(X: Tensor, groups: Groups, weights: _Cast | _Packed, *, transposed: bool) -> Tensor:
    """X W[e]ᵀ, or X W[e], row by row of groups."""
    if not groups.on_host:
        return weights.on_device(X, groups, transposed=transposed)
    used = groups.used
    if not used.experts:
        return X.new_zeros(X.shape[0], weights.N if transposed else weights.K)
    most = max(1, min(_BUFFER // (weights.N * weights.K), weights.experts // 4))
    few_rows = groups.rows <= len(used.experts) * _FEW_ROWS[X.element_size()]
    batched = few_rows and most >= _SIDE_BY_SIDE and X.device.type == "cpu"
    slabs = used.slabs(most) if batched else None
    weights.prepare(slabs.experts if slabs else used.experts)
    buffer = _buffer(X, (min(most, len(used.experts)), weights.N, weights.K))
    made = buffer.mT if transposed else buffer
    if slabs:
        return slabs.product(X, made.shape[2], _made_by_slab(slabs, weights, buffer, made))
    Y = X.new_empty(X.shape[0], made.shape[2])
    parts = zip(used.split(X), used.split(Y), strict=True)
    for first in range(0, len(used.experts), most):
        n = min(most, len(used.experts) - first)
        weights.fill(buffer[:n], first)
        for W, (x, y) in zip(made[:n], parts, strict=False):
            torch.mm(x, W, out=y)
    for _, y in parts:  # the rows of nobody
        y.zero_()
    return Y


def _made_by_slab(
    slabs: Slabs, weights: _Cast | _Packed, buffer: Tensor, made: Tensor
) -> Iterator[Tensor]:
    """The weights of each batch; `made` is the buffer as the product reads it."""
    first = 0
    for slab in slabs.each:
        ends = list(itertools.accumulate(n for n, _ in slab))
        weights.fill(buffer[: ends[-1]], first)
        first += ends[-1]
        for (n, _), end in zip(slab, ends, strict=True):
            yield made[end - n : end]


def _buffer(X: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """For weights that meet X at once."""
    if X.device.type == "cpu":
        return thread_buffer(torch.Size(shape).numel(), X.dtype).view(shape)
    return X.new_empty(shape)
