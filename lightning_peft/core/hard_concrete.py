"""Hard-concrete gates: values in [0, 1] that are drawn, and closed or open with some probability.

z = clip(σ((log u − log(1 − u) + α) / τ) (ζ − γ) + γ, 0, 1), u uniform. Without sampling
z = clip(σ(α) (ζ − γ) + γ, 0, 1).

Source: Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gate", "keep_largest", "open_probability"]

_GAMMA, _ZETA = -0.1, 1.1  # ends of the stretched interval, as in the paper


def gate(alpha: Tensor, tau: Tensor, sampled: bool) -> Tensor:
    """Return z, drawn or at its mean."""
    if sampled:
        u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((u.log() - (1 - u).log() + alpha) / tau)
    else:
        s = torch.sigmoid(alpha)
    return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def open_probability(alpha: Tensor, tau: Tensor) -> Tensor:
    """Return the probability that a drawn gate is not closed: σ(α − τ log(−γ / ζ))."""
    return torch.sigmoid(alpha - tau * math.log(-_GAMMA / _ZETA))


def keep_largest(changes: list[Tensor], share: float) -> list[Tensor]:
    """Return masks of the entries of largest magnitude, a share of all of them together."""
    if not changes:
        return []
    flat = torch.cat([d.abs().flatten() for d in changes])
    kept = max(1, round(share * flat.numel()))
    least = flat.kthvalue(flat.numel() - kept + 1).values
    return [(d.abs() >= least) & (d != 0) for d in changes]
