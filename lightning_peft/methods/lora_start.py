"""First values of LoRA's A and B, random or from the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_peft.core.site import Site
from lightning_peft.methods.triplets import leading_triplets

__all__ = [
    "loftq_start",
    "minor_directions",
    "qr_factors",
    "random_start",
    "singular_factors",
]


def random_start(init: str, A: Tensor, B: Tensor, r: int) -> None:
    """Set A and B to the values of an initialisation that needs no weight, in place."""
    nn.init.zeros_(B)
    if init == "gaussian":
        nn.init.normal_(A, std=1.0 / r)
    elif init == "orthogonal" and A.device.type != "meta":
        # Two halves of one orthogonal basis: B A = 0 although neither is zero.
        Q = torch.linalg.qr(torch.randn(*A.shape[:-2], r, r))[0]
        A.copy_((torch.randn(*A.shape[:-2], A.shape[-1], r // 2) @ Q[..., 1::2, :]).mT / 10)
        B.copy_(torch.randn(*B.shape[:-2], B.shape[-2], r // 2) @ Q[..., 0::2, :] / 10)
    else:  # Kaiming-uniform with a = √5 over rows of length in: U(−1/√in, 1/√in)
        nn.init.uniform_(A, -1 / math.sqrt(A.shape[-1]), 1 / math.sqrt(A.shape[-1]))


def singular_factors(W: Tensor, r: int, s: float, niter: int | None) -> tuple[Tensor, Tensor]:
    """Return A = √(S/s) Vᵀ and B = U √(S/s) of the r leading singular triplets."""
    if niter is None:
        U, S, Vh = leading_triplets(W, r)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.mT
    root = (S / s).sqrt()
    return root.unsqueeze(-1) * Vh, U * root.unsqueeze(-2)


def qr_factors(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return OLoRA's A and B: the first r rows of R and columns of Q, W = Q R."""
    Q, R = torch.linalg.qr(W)
    return R[..., :r, :], Q[..., :, :r]


def minor_directions(W: Tensor, r: int) -> Tensor:
    """Return MiCA's B: the left singular vectors of the r smallest singular values."""
    U: Tensor = torch.linalg.svd(W, full_matrices=False)[0]
    return U[..., -r:].contiguous()


def loftq_start(
    site: Site, W: Tensor, r: int, s: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return LoftQ's A, B and base.

    Iterations alternate: the base takes what the factors leave, the factors take what quantising
    loses.
    """
    base = W
    A, B = singular_factors(W - site.quantization_roundtrip(base), r, s, None)
    for _ in range(iterations - 1):
        base = W - s * (B @ A)
        A, B = singular_factors(W - site.quantization_roundtrip(base), r, s, None)
    return A, B, base
