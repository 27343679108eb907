"""y = x Wᵀ + S Bᵀ + bias for few rows of x, decoding the 4-bit W [N, K] inside the product.

Shapes: x [M, K] with M ≤ 64, S = s · x Aᵀ [M, R], B [N, R], bias [N]. Reads the packed weight once
(0.516 N·K bytes); dequantising to a buffer moves 4.5 N·K. `select_product` chooses between our
two kernels (`small_batch_triton`, and `pair_table_triton` where a race on the device found it
fastest), bitsandbytes' and the library product of the dequantised weight. Forward only: dX
dequantises and multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.dispatch import Backend, Decision, current_backend
from lightning_peft_kernels.launch import attempt
from lightning_peft_kernels.nf4 import bitsandbytes_product
from lightning_peft_kernels.nf4.ops import dequantize_4bit, dequantize_4bit_reference
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing
from lightning_peft_kernels.nf4.selection import PAIRS, select_product, small_batch_detail
from lightning_peft_kernels.registration import define_op

__all__ = ["multiply_few", "nf4_small_batch", "nf4_small_batch_reference"]


def nf4_small_batch_reference(
    x: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    S: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "nf4",
    block_size: int = 64,
) -> Tensor:
    """Compute `nf4_small_batch` in plain torch."""
    W = dequantize_4bit_reference(q, shape, x.dtype, kind=kind, block_size=block_size)
    y = torch.nn.functional.linear(x, W, bias)
    return y if S is None or B is None else y + (S @ B.mT).to(y.dtype)


def _small_batch(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    S: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    kind: str,
    block_size: int,
    backend: Backend = "auto",
) -> Tensor:
    q = Packed4bit(packed, absmax, absmax2, offset)
    packing = Packing(shape, kind, block_size)
    how = select_product(x.device, x.dtype, x.shape[0], shape, backend, block_size, kind=kind)
    return multiply_few(x, q, packing, S, B, bias, backend, how)


def multiply_few(
    x: Tensor,
    q: Packed4bit,
    packing: Packing,
    S: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    backend: Backend,
    how: Decision,
) -> Tensor:
    """Compute the op as decided, without torch's dispatcher.

    Args:
        x: [M, K] floating.
        q: Bytes of W.
        packing: Layout of W [N, K].
        S: [M, R], scaled, in the dtype of x; None without a low rank.
        B: [N, R], or None.
        bias: [N] in the dtype of x, or None.
        backend: Requested backend.
        how: What `select_product` selected.
    """
    shape, kind, block_size = packing

    def add_low_rank(y: Tensor) -> Tensor:
        return y if S is None or B is None else y.addmm_(S, B.mT)

    def by_library() -> Tensor:
        W = dequantize_4bit(q, shape, x.dtype, kind=kind, block_size=block_size, backend=backend)
        return add_low_rank(torch.nn.functional.linear(x, W, bias))

    def by_kernel() -> Tensor:
        from lightning_peft_kernels.nf4.small_batch_triton import decode

        return decode(x.contiguous(), q, shape[0], *_without_gaps(S, B, bias), kind, block_size)

    def by_pairs() -> Tensor:
        from lightning_peft_kernels.nf4.pair_table_triton import decode_pairs

        there = _without_gaps(S, B, bias)
        return decode_pairs(x.contiguous(), q, shape[0], *there, kind, block_size)

    if how.backend == "bitsandbytes":
        y = bitsandbytes_product.multiply(x, q, shape, bias, kind, block_size)
        return add_low_rank(y)
    if how.backend == "dequantize":
        return by_library()
    if how.backend == "pairs":
        return attempt("nf4_small_batch", x.dtype, PAIRS, x.device, backend, by_pairs, by_library)
    detail = small_batch_detail(x.shape[0])
    return attempt("nf4_small_batch", x.dtype, detail, x.device, backend, by_kernel, by_library)


def _without_gaps(
    S: Tensor | None, B: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        S if S is None else S.contiguous(),
        B if B is None else B.contiguous(),
        bias if bias is None else bias.contiguous(),
    )


def _small_batch_fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    *rest: object,
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


define_op(
    "nf4_small_batch(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, "
    "SymInt[] shape, Tensor? S, Tensor? B, Tensor? bias, str kind, int block_size, "
    "str backend='auto') -> Tensor",
    fake=_small_batch_fake,
    default=_small_batch,
)


def nf4_small_batch(
    x: Tensor,
    q: Packed4bit,
    shape: Sequence[int],
    S: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "nf4",
    block_size: int = 64,
    backend: Backend | None = None,
) -> Tensor:
    """Compute ``y = x Wᵀ + S Bᵀ + bias`` [M, N]; not differentiable.

    Args:
        x: [M, K] floating.
        q: Bytes of W.
        shape: [N, K].
        S: [M, R], scaled; None without a low rank.
        B: [N, R], or None.
        bias: [N], or None.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: Block size used to quantise.
        backend: Requested backend; default `current_backend()`.
    """
    y: Tensor = torch.ops.lightning_peft.nf4_small_batch(
        x, *q, list(shape), S, B, bias, kind, block_size, backend or current_backend()
    )
    return y
