"""x Wᵀ for few rows of x on CPUs with AVX512-BF16, by bitsandbytes' kernel.

The kernel multiplies bf16 pairs and sums in fp32. It reads W [N, K] once, 0.53 bytes per weight, in
an order of its own: 32 rows interleaved, and one bf16 scale per block. Dequantising first moves 4.5
bytes. Measured on 1024 × 2048, one thread (AMD EPYC, bitsandbytes 0.50.2): 8 × as fast at one
token, 1.2 × at 32, slower from 64 on.

The scales are rounded to bf16, so a product differs from the exact one by up to 2⁻⁹ per block. It
is for generation only. The reordered copy lives as long as the weight's bytes, takes as much memory
again, and is dropped when a product with gradients reads the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.nf4 import cpu as nf4_cpu
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing

__all__ = ["MOST_TOKENS", "REORDERED", "drop_reordered", "has_bf16_product", "multiply_bf16"]

#: Rows of x up to which the kernel is faster than dequantising and multiplying.
MOST_TOKENS = 32
_ROWS = 32  # rows of W that the kernel reads together


class _Reordered(NamedTuple):
    """A weight in the kernel's order.

    Attributes:
        owner: The bytes that it was made from.
        version: Their version and address at that time.
        packed: uint8 [N · K / 2].
        scales: bf16 [K / block, N].
    """

    owner: weakref.ref[Tensor]
    version: tuple[int, int]
    packed: Tensor
    scales: Tensor


#: Id of the bytes of a weight → their reordered copy.
REORDERED: dict[int, _Reordered] = {}


@cache
def _routine(kind: str) -> Callable[..., None] | None:
    """Return bitsandbytes' routine; None without it or without AVX512-BF16.

    Arguments: M, N, K; addresses of x, W, scales and y; block size, row strides of x and y.
    """
    is_supported = nf4_cpu.native_routine("has_avx512bf16_cpu", 0)
    if is_supported is None or not is_supported():
        return None
    return nf4_cpu.native_routine(f"gemv_4bit_inference_cpu_{kind}_bf16", 10)


def has_bf16_product(shape: Sequence[int], kind: str, block_size: int) -> bool:
    """Whether the kernel takes a weight [N, K]: whole groups of 32 rows, whole blocks per row."""
    fits = shape[0] % _ROWS == 0 and shape[1] % block_size == 0 and shape[1] >= 64
    return fits and _routine(kind) is not None


def multiply_bf16(x: Tensor, q: Packed4bit, packing: Packing) -> Tensor:
    """Return x Wᵀ bf16 [M, N] of x bf16 [M, K] with contiguous rows."""
    (N, K), kind, block_size = packing
    routine = _routine(kind)
    assert routine is not None  # `has_bf16_product`
    held = _reordered(q, packing)
    x = x if x.stride(-1) == 1 else x.contiguous()
    M = x.shape[0]
    y = torch.empty(M, N, dtype=torch.bfloat16)
    pointers = x.data_ptr(), held.packed.data_ptr(), held.scales.data_ptr(), y.data_ptr()
    routine(M, N, K, *pointers, block_size, x.stride(0), N)
    return y


def drop_reordered(q: Packed4bit) -> None:
    """Free the copy of a weight that is trained through again."""
    REORDERED.pop(id(q.packed), None)


def _reordered(q: Packed4bit, packing: Packing) -> _Reordered:
    bytes_, key = q.packed, id(q.packed)
    held = REORDERED.get(key)
    version = (0 if bytes_.is_inference() else bytes_._version, bytes_.data_ptr())
    if held is None or held.owner() is not bytes_ or held.version != version:
        owner = weakref.ref(bytes_, lambda _: REORDERED.pop(key, None))
        with torch.inference_mode(False), torch.no_grad():
            held = REORDERED[key] = _Reordered(owner, version, *_reorder(q, packing))
    return held


def _reorder(q: Packed4bit, packing: Packing) -> tuple[Tensor, Tensor]:
    """Interleave 32 rows: byte t of a pair of columns holds rows t // 2 (low) and t // 2 + 16."""
    (N, K), _, block_size = packing
    rows = q.packed.reshape(N // _ROWS, _ROWS, K // 2)
    first, second = rows[:, : _ROWS // 2], rows[:, _ROWS // 2 :]
    packed = torch.empty(N // _ROWS, K // 2, _ROWS // 2, 2, dtype=torch.uint8)
    # The even column of a byte is in its high nibble.
    torch.bitwise_or(first >> 4, second & 0xF0, out=packed[..., 0].transpose(1, 2))
    torch.bitwise_or(first & 0xF, second << 4, out=packed[..., 1].transpose(1, 2))
    absmax = q.absmax.reshape(-1)
    if q.absmax2 is not None and q.offset is not None:
        absmax = nf4_cpu.block_scales(absmax, q.absmax2, q.offset)
    scales = absmax.view(N, K // block_size).T.to(torch.bfloat16).contiguous()
    return packed.view(-1), scales
