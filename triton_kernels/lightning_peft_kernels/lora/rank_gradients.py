"""Both gradients that a low-rank branch takes from dY, in one pass over it.

    dS = s · dY B  [M, R]      dB = dYᵀ S  [N, R]      dY [M, N], S [M, R] (scaled), B [N, R]

As two products dY is read twice, 4 bytes an element in bf16, and at R ≪ N nothing else counts.
The kernel reads it once and writes partial sums of both in fp32: with 256 columns and 1,024 rows a
program they are R/64 + R/256 bytes an element, read once more: 2.6 bytes in all at R = 16, 3.3 at
32. Above that the parts eat the gain, and two products are made (`backend.choose_one_pass`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft_kernels.dispatch import choose_one_pass

__all__ = ["rank_gradients", "rank_gradients_reference"]

_library = torch.library.Library("lightning_peft", "FRAGMENT")
_library.define("rank_gradients(Tensor dY, Tensor S, Tensor B, float scaling) -> (Tensor, Tensor)")


def rank_gradients_reference(
    dY: Tensor, S: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """As two products."""
    dS = dY @ B
    return (dS if scaling == 1.0 else dS * scaling), dY.mT @ S


def rank_gradients(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(dS [M, R], dB [N, R]) in the dtype of dY.

    Args:
        dY: [M, N], of one dtype with S and B.
        S: [M, R], s · drop(x) Aᵀ.
        B: [N, R].
        scaling: s.
    """
    if choose_one_pass(dY.device, dY.dtype, B.shape[1]).backend == "torch":
        return rank_gradients_reference(dY, S, B, scaling)
    dS, dB = torch.ops.lightning_peft.rank_gradients(dY, S, B, scaling)
    return dS, dB


def _impl(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    how = choose_one_pass(dY.device, dY.dtype, B.shape[1])
    if how.backend == "torch" or not dY.numel():
        return rank_gradients_reference(dY, S, B, scaling)
    from lightning_peft_kernels.lora.rank_gradients_triton import gradients

    return gradients(dY.contiguous(), S.contiguous(), B.contiguous(), scaling)


def _fake(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    (M, N), R = dY.shape, B.shape[1]
    return dY.new_empty(M, R), dY.new_empty(N, R)


_library.impl("rank_gradients", _impl, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_peft::rank_gradients", _fake, lib=_library)
