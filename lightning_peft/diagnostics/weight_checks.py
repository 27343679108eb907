"""The kernels of packed weights against references: quantise, dequantise, few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from lightning_peft_kernels.block_scaled.decode import decode_blocks, decode_blocks_reference
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from lightning_peft_kernels.dispatch import Decision, configuration, select
from lightning_peft_kernels.fp8.products import e4m3_scale, select_fp8
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, quantize_4bit
from lightning_peft_kernels.nf4.packed import Packing
from lightning_peft_kernels.nf4.reference import dequantize_4bit_reference, quantize_4bit_reference
from lightning_peft_kernels.nf4.selection import (
    PAIRS,
    select_pairs,
    select_product,
    small_batch_detail,
)
from lightning_peft_kernels.nf4.small_batch import multiply_few, nf4_small_batch
from torch import Tensor

from lightning_peft.diagnostics.pairs import Pair, Shape, bits, close, packed_on, randn, to_device
from lightning_peft.diagnostics.trials import Check, Trial

__all__ = ["WeightChecks", "e4m3_check"]

#: Codes of one and of two per byte, signed and with zero points, scales of every kind.
_LAYOUTS = (
    BlockLayout("e4m3", 128, 128),
    BlockLayout("e4m3", 0, 0, 1, "e8m0"),
    BlockLayout("e2m1", 1, 32, 1, "e8m0"),
    BlockLayout("e2m1", 1, 16, 1, "e4m3"),
    BlockLayout("int8", 1, 0, 1, "bfloat16"),
    BlockLayout("int4", 1, 32, 1, "float16"),
    BlockLayout("uint4", 1, 32, 1, "float16"),
)


class WeightChecks:
    """Checks of one dtype on one shape class.

    Args:
        device: Where kernels run.
        dtype: Dtype of activations and of dequantised weights.
        shape: (N, K) of a weight; tokens are not used.
        short: Whether this dtype is checked at the start of fit.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: Shape, *, short: bool
    ) -> None:
        self.device, self.dtype, self.short = device, dtype, short
        self.size = (shape.N, shape.K)

    def each(self) -> Iterator[Check]:
        """Yield the checks."""
        device, dtype, name = self.device, self.dtype, configuration(self.dtype)
        for op, trials in (
            ("quantize_4bit", self._quantize),
            ("dequantize_4bit", self._dequantize),
            ("decode_blocks", self._decode_blocks),
        ):
            yield Check(op, name, trials, partial(select, op, device, dtype), self.short)
        for tokens in (1, 16, 32, 64):
            yield Check(
                "nf4_small_batch", configuration(dtype, small_batch_detail(tokens)),
                partial(self._small_batch, tokens),
                partial(select_product, device, dtype, tokens, self.size),
                self.short and tokens == 1,
            )  # fmt: skip
        yield Check(
            "nf4_small_batch", configuration(dtype, PAIRS), self._pairs,
            partial(select_pairs, device, dtype, 1, self.size), self.short,
        )  # fmt: skip

    def _quantize(self) -> Iterator[Trial]:
        """Scales are exact; a decoded value is the nearest code, up to the last bits of w / m."""
        W = randn(*self.size).to(self.dtype)
        there = W.to(self.device)

        def compare(found: Sequence[Tensor]) -> list[Pair]:
            back = to_device(Packed4bit(found[0], found[1], None, None), torch.device("cpu"))
            values = dequantize_4bit_reference(back, W.shape, torch.float64)
            best = dequantize_4bit_reference(
                quantize_4bit_reference(W, double_quant=False), W.shape, torch.float64
            )
            exact = W.double()
            limit = 1e-5 * float(back.absmax.double().amax())
            return [
                bits("absmax", back.absmax, W.float().view(-1, 64).abs().amax(1)),
                Pair("distance", (values - exact).abs(), (best - exact).abs(), limit=limit),
            ]

        yield Trial(lambda: tuple(quantize_4bit(there, double_quant=False)[:2]), compare)

    def _dequantize(self) -> Iterator[Trial]:
        for nested in (True, False):
            q, there = packed_on(self.device, *self.size, nested)
            yield Trial(
                _one(dequantize_4bit, there, self.size, self.dtype),
                _same_bits(dequantize_4bit_reference, q, self.size, self.dtype),
            )

    def _decode_blocks(self) -> Iterator[Trial]:
        W = randn(*self.size)
        for layout in _LAYOUTS:
            q = encode_blocks(W, layout)
            there = BlockTensors(*(None if t is None else t.to(self.device) for t in q))  # type: ignore[arg-type]
            yield Trial(
                _one(decode_blocks, there, self.size, layout, self.dtype),
                _same_bits(decode_blocks_reference, q, self.size, layout, self.dtype),
            )

    def _factors(self, tokens: int) -> list[Tensor]:
        """Return x, S, B and bias of a product with a low rank, on the CPU."""
        N, K = self.size
        return [randn(*s).to(self.dtype) for s in ((tokens, K), (tokens, 8), (N, 8), (N,))]

    def _product(self, W: Tensor, tensors: list[Tensor], name: str) -> Callable[..., list[Pair]]:
        def compare(found: Sequence[Tensor]) -> list[Pair]:
            x, S, B, bias = (t.double() for t in tensors)
            return [close(name, found[0], x @ W.T + S @ B.T + bias)]

        return compare

    def _small_batch(self, tokens: int) -> Iterator[Trial]:
        q, there = packed_on(self.device, *self.size, True)
        tensors = self._factors(tokens)
        x, *others = (t.to(self.device) for t in tensors)
        W = dequantize_4bit_reference(q, self.size, torch.float64)
        yield Trial(
            _one(nf4_small_batch, x, there, self.size, *others), self._product(W, tensors, "y")
        )

    def _pairs(self) -> Iterator[Trial]:
        """All rows up to eight; blocks as long as K allows, so that one holds several steps too."""
        how = Decision("pairs", "checked")
        for block_size in (64, 32, 128):
            if self.size[1] % block_size:
                continue
            W = randn(*self.size) / self.size[1] ** 0.5
            q = quantize_4bit_reference(W, block_size=block_size, double_quant=block_size != 64)
            there, packing = to_device(q, self.device), Packing(self.size, "nf4", block_size)
            Wd = dequantize_4bit_reference(q, self.size, torch.float64, block_size=block_size)
            for tokens in (1, 3, 8):
                tensors = self._factors(tokens)
                x, *others = (t.to(self.device) for t in tensors)
                name = f"y of {tokens} rows, blocks of {block_size}"
                yield Trial(
                    _one(multiply_few, x, there, packing, *others, "triton", how),
                    self._product(Wd, tensors, name),
                )


def e4m3_check(device: torch.device, shape: Shape) -> Check:
    """Return the check of a weight that is dequantised to e4m3, in both orientations."""
    size = (shape.N, shape.K)

    def trials() -> Iterator[Trial]:
        q, there = packed_on(device, *size, True)
        scale = e4m3_scale(q)
        W = dequantize_4bit_reference(q, size, torch.float32) * (1.0 / scale)
        want = W.to(torch.float8_e4m3fn).view(torch.uint8)
        op = torch.ops.lightning_peft.dequantize_e4m3
        for turned in (False, True):
            bytes_ = (want.T if turned else want).contiguous()
            yield Trial(
                _one(op, *there, scale.to(device), list(size), turned, "nf4", 64, "triton"),
                _same_bits(bytes_.clone, view=torch.uint8),
            )

    return Check(
        "dequantize_e4m3", configuration(torch.bfloat16), trials,
        partial(select_fp8, (16, 16), device),
    )  # fmt: skip


def _one(op: Callable[..., Tensor], *arguments: object) -> Callable[[], Sequence[Tensor]]:
    return lambda: (op(*arguments),)


def _same_bits(
    reference: Callable[..., Tensor], *arguments: object, view: torch.dtype | None = None
) -> Callable[[Sequence[Tensor]], list[Pair]]:
    def compare(found: Sequence[Tensor]) -> list[Pair]:
        got = found[0] if view is None else found[0].view(view)
        return [bits("W", got, reference(*arguments))]

    return compare
