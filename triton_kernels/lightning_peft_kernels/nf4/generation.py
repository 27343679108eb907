"""Products of a packed weight without gradients: few calls between a layer and its kernel.

Generation multiplies few rows by every layer, so the time of Python counts. These functions skip
the autograd function, the settings that its backward needs, and torch's dispatcher.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_peft_kernels.autograd import scaled_linear
from lightning_peft_kernels.dispatch import current_backend
from lightning_peft_kernels.lora.linear import add_low_rank_
from lightning_peft_kernels.nf4.bf16_cpu import multiply_bf16
from lightning_peft_kernels.nf4.packed import Packed4bit, Packing
from lightning_peft_kernels.nf4.selection import select_product
from lightning_peft_kernels.nf4.small_batch import multiply_few
from lightning_peft_kernels.nf4.weight_buffers import weight_for_product

__all__ = ["linear_without_gradients"]


def linear_without_gradients(
    x: Tensor,
    q: Packed4bit,
    packing: Packing,
    bias: Tensor | None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Compute ``y = x Wᵀ + scaling · x Aᵀ Bᵀ + bias`` [..., N] in the dtype of x.

    Args:
        x: [..., K] floating.
        q: Bytes of W.
        packing: Layout of W [N, K].
        bias: [N] or None.
        A: [R, K], or None without a low rank.
        B: [N, R], or None.
        scaling: Number.
    """
    x2 = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    backend = current_backend()
    shape, kind, block_size = packing
    how = select_product(
        x.device, x.dtype, x2.shape[0], shape, backend, block_size, kind=kind, exact=False
    )
    S = None
    if how.backend == "bf16":
        y = multiply_bf16(x2, q, packing)
        y = y if bias is None else y.add_(bias)
    elif how.backend != "dequantize":
        if A is not None and A.dtype == x.dtype and how.backend in ("fused", "pairs"):
            S = scaled_linear(x2, A, scaling)  # the kernel adds S Bᵀ in its last pass
        y = multiply_few(x2, q, packing, S, None if S is None else B, bias, backend, how)
    else:
        y = F.linear(x2, weight_for_product(q, packing, x.dtype, backend), bias)
    if A is not None and B is not None and S is None:
        y = add_low_rank_(y, x2, A, B, scaling)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])
