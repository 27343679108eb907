"""Projections onto the space of orthonormal vectors, and the distance from such vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["distance_to_orthonormal", "keep_space", "remove_space"]


def keep_space(G: Tensor, basis: Tensor) -> None:
    """Leave of the columns of G [n, k] what lies in the space of orthonormal columns [n, m]."""
    L = basis.to(G)
    G.copy_(L @ (L.mT @ G))


def remove_space(G: Tensor, basis: Tensor) -> None:
    """Take out of the columns of G [n, k] what lies in the space of orthonormal columns [n, m]."""
    H = basis.to(G)
    G.sub_(H @ (H.mT @ G))


def distance_to_orthonormal(P: Tensor) -> Tensor:
    """‖P Pᵀ − I‖ of rows [r, n], in the Frobenius norm."""
    eye = torch.eye(P.shape[0], dtype=P.dtype, device=P.device)
    distance: Tensor = torch.linalg.matrix_norm(P @ P.mT - eye)
    return distance
