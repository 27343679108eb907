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
from lightning_peft_kernels.launch import LaunchError, note_refusal
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
    if how.backend in ("fused", "pairs"):
        # As `launch.attempt`, without closures: every layer of a generation step comes here.
        try:
            if how.backend == "pairs":
                from lightning_peft_kernels.nf4.pair_table_triton import decode_pairs

                return decode_pairs(x, q, shape[0], S, B, bias, kind, block_size)
            from lightning_peft_kernels.nf4.small_batch_triton import decode

            return decode(x, q, shape[0], S, B, bias, kind, block_size)
        except LaunchError as error:
            detail = PAIRS if how.backend == "pairs" else small_batch_detail(x.shape[0])
            note_refusal("nf4_small_batch", x.dtype, detail, x.device, backend, error)
    if how.backend == "bitsandbytes":
        y = bitsandbytes_product.multiply(x, q, shape, bias, kind, block_size)
    else:
        W = dequantize_4bit(q, shape, x.dtype, kind=kind, block_size=block_size, backend=backend)
        y = torch.nn.functional.linear(x, W, bias)
    return y if S is None or B is None else y.addmm_(S, B.mT)


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
