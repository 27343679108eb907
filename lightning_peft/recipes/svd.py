"""Low-rank factors by singular values, and the rank that a share of the energy needs.

The energy of a matrix is the sum of its squared singular values, ‖M‖²_F.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factors", "kept_energy", "rank_for", "thin_svd"]

_EXACT = 2048  # smaller side up to which the whole decomposition is made
_OVERSAMPLING, _POWER = 16, 4


def factors(M: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A [*, r, in] and B [*, out, r] such that B A approximates M [*, out, in] best.

    The singular values are split evenly between both. Above 2048 on the smaller side the
    decomposition is randomised (Halko et al. 2011), with 4 power iterations.
    """
    if min(M.shape[-2:]) <= _EXACT:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        q = min(r + _OVERSAMPLING, *M.shape[-2:])
        U, S, V = torch.svd_lowrank(M, q=q, niter=_POWER)
        Vh = V.mT
    return balanced(U, S, Vh, r)


def balanced(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the first r singular triplets as (A, B)."""
    root = S[..., :r].sqrt()
    A = root.unsqueeze(-1) * Vh[..., :r, :]
    B = U[..., :r] * root.unsqueeze(-2)
    return A.contiguous(), B.contiguous()


def thin_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [*, out, k], S [*, k] and Vh [*, k, in] of B A without forming the product.

    B = Q_B R_B and Aᵀ = Q_A R_A, so that B A = Q_B (R_B R_Aᵀ) Q_Aᵀ and only a matrix of the rank's
    size is decomposed.
    """
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def rank_for(S: Tensor, energy: float) -> int:
    """Return the smallest number of singular values [*, k] with this share of the energy.

    Of several matrices, the largest that one of them needs.
    """
    squares = S.double().square()
    total = squares.sum(-1, keepdim=True)
    shares = squares.cumsum(-1) / total.clamp_min(torch.finfo(torch.float64).tiny)
    # Rounding may leave the last share just below 1.
    enough = (shares >= energy - 1e-12) | (total == 0)
    enough[..., -1] = True
    return int(enough.int().argmax(-1).max()) + 1


def kept_energy(M: Tensor, A: Tensor, B: Tensor) -> float:
    """Return 1 − ‖M − B A‖² / ‖M‖², computed directly, so it holds for randomised factors."""
    total = float(M.double().square().sum())
    lost = float((M - B @ A).double().square().sum())
    return 1.0 if total == 0 else 1.0 - lost / total
