"""Balls around the embeddings of a prompt, by the kind of each token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["project_into_balls", "radii_by_kind"]


def radii_by_kind(
    types: Sequence[int], epsilon: float, format_epsilon: float, width: int
) -> Tensor:
    """Return the radius around each position [n, 1]; 0 where it stays.

    Args:
        types: Kind of each token, 4 · example + 2 for inputs, 0 for those that stay.
        epsilon: Radius of inputs at a width of 2048; it grows with the root of the width.
        format_epsilon: Radius of all others.
        width: Width of the embeddings.
    """
    kinds = torch.tensor(list(types)) % 4
    scale = math.sqrt(width / 2048)
    radii = torch.where(kinds == 2, epsilon * scale, format_epsilon * scale)
    return torch.where(kinds == 0, 0.0, radii).unsqueeze(1)


def project_into_balls(P: Tensor, radii: Tensor) -> None:
    """Scale rows of P [n, width] down to their radii [n, 1], in place."""
    radii = radii.to(P)
    norm = torch.linalg.vector_norm(P, dim=1, keepdim=True)
    P.mul_(radii / norm.clamp(min=torch.finfo(norm.dtype).tiny).maximum(radii))
