"""y = x Wᵀ + S Bᵀ + bias for few rows of x, with W [N, K] decoded from 4 bit inside the product.

Shapes: x [M, K] with M ≤ 64, S = s · x Aᵀ [M, R], B [N, R], bias [N]. Bytes moved: the packed
weight once (0.516 N·K) where dequantising to a buffer moves 4.5 N·K; from the crossing on (a table
in `backend.py`) the library's product of the dequantised weight wins. Forward only: dX of so few
rows is dequantise and multiply.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft_kernels.dispatch import FLOAT32_TOKENS, choose
from lightning_peft_kernels.nf4.ops import Packed4bit, dequantize_4bit, dequantize_4bit_reference

__all__ = ["nf4_decode", "nf4_decode_reference"]


def nf4_decode_reference(
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
    """The formula in plain torch."""
    W = dequantize_4bit_reference(q, shape, x.dtype, kind=kind, block_size=block_size)
    y = torch.nn.functional.linear(x, W, bias)
    return y if S is None or B is None else y + (S @ B.mT).to(y.dtype)


_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define(
    "nf4_decode(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, "
    "SymInt[] shape, Tensor? S, Tensor? B, Tensor? bias, str kind, int block_size) -> Tensor"
)


def _impl(
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
) -> Tensor:
    q = Packed4bit(packed, absmax, absmax2, offset)
    most = FLOAT32_TOKENS if x.dtype.itemsize > 2 else 64
    M, fits = x.shape[0], x.shape[1] % 8 == 0 and 1 <= x.shape[0] <= most
    if M and fits and choose("nf4_decode", x.device, x.dtype).backend == "triton":
        from lightning_peft_kernels.nf4.small_batch_triton import decode

        S, B = (None if t is None else t.contiguous() for t in (S, B))
        return decode(x.contiguous(), q, shape[0], S, B, bias, kind, block_size)
    W = dequantize_4bit(q, shape, x.dtype, kind=kind, block_size=block_size)
    y = torch.nn.functional.linear(x, W, bias)
    if S is not None and B is not None:
        y += S @ B.mT
    return y


def _fake(
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
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


_library.impl("nf4_decode", _impl, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_peft::nf4_decode", _fake, lib=_library)


def nf4_decode(
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
    """Y [M, N]; not differentiable.

    Args:
        x: [M, K] floating.
        q: Bytes of W.
        shape: [N, K].
        S: [M, R], scaled; None without a low rank.
        B: [N, R], or None.
        bias: [N], or None.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: As quantised.
    """
    y: Tensor = torch.ops.lightning_peft.nf4_decode(
        x, *q, list(shape), S, B, bias, kind, block_size
    )
    return y
