"""Both gradients that a low-rank branch takes from dY, in one pass over it.

    dS = s · dY B  [M, R]      dB = dYᵀ S  [N, R]      dY [M, N], S [M, R] (scaled), B [N, R]

Two products read dY twice: 4 bytes per element in bf16, which dominates at R ≪ N. The kernel reads
dY once and writes partial sums of both gradients in fp32. With 256 columns and 1,024 rows per
program these take R/64 + R/256 bytes per element and are read once more: 2.6 bytes in all at
R = 16, 3.3 at R = 32. Larger ranks lose the gain to partial sums and use two products
(`select_one_pass`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import scaled_linear
from lightning_peft_kernels.dispatch import Backend, current_backend
from lightning_peft_kernels.launch import LaunchError, note_refusal
from lightning_peft_kernels.lora.selection import rank_detail, select_one_pass
from lightning_peft_kernels.registration import define_op

__all__ = ["rank_gradients", "rank_gradients_reference"]


def rank_gradients_reference(
    dY: Tensor, S: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute `rank_gradients` as two products."""
    return scaled_linear(dY, B.mT, scaling), dY.mT @ S


def rank_gradients(
    dY: Tensor, S: Tensor, B: Tensor, scaling: float, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dS [M, R], dB [N, R]) in the dtype of dY.

    Args:
        dY: [M, N], in the dtype of S and B.
        S: [M, R], s · drop(x) Aᵀ.
        B: [N, R].
        scaling: s.
        backend: Requested backend; default `current_backend()`.
    """
    requested = backend or current_backend()
    if torch.compiler.is_compiling():
        if select_one_pass(dY.device, dY.dtype, B.shape[1], requested).backend == "torch":
            return rank_gradients_reference(dY, S, B, scaling)
        dS, dB = torch.ops.lightning_peft.rank_gradients(dY, S, B, scaling, requested)
        return dS, dB
    return _rank_gradients(dY, S, B, scaling, requested)


def _rank_gradients(
    dY: Tensor, S: Tensor, B: Tensor, scaling: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    rank = B.shape[1]
    if not dY.numel() or select_one_pass(dY.device, dY.dtype, rank, backend).backend == "torch":
        return rank_gradients_reference(dY, S, B, scaling)
    from lightning_peft_kernels.lora.rank_gradients_triton import low_rank_gradients

    try:
        return low_rank_gradients(dY.contiguous(), S.contiguous(), B.contiguous(), scaling)
    except LaunchError as error:
        note_refusal("rank_gradients", dY.dtype, rank_detail(rank), dY.device, backend, error)
    return rank_gradients_reference(dY, S, B, scaling)


def _rank_gradients_fake(
    dY: Tensor, S: Tensor, B: Tensor, scaling: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    (M, N), R = dY.shape, B.shape[1]
    return dY.new_empty(M, R), dY.new_empty(N, R)


define_op(
    "rank_gradients(Tensor dY, Tensor S, Tensor B, float scaling, str backend='auto') -> "
    "(Tensor, Tensor)",
    fake=_rank_gradients_fake,
    default=_rank_gradients,
)
