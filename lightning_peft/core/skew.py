"""Skew-symmetric blocks from their upper triangles, and the orthogonal blocks of Cayley's map."""

from __future__ import annotations

import functools

import torch
from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, in_functorch_transform
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cayley", "near_zero", "skew"]


def skew(triangle: Tensor, size: int) -> Tensor:
    """Rows of the strict upper triangle [n, size(size − 1)/2] → skew [n, size, size]."""
    if in_functorch_transform():
        return _skew(triangle, size)
    Q: Tensor = _Skew.apply(triangle, size)
    return Q


def _skew(triangle: Tensor, size: int) -> Tensor:
    _, at = _places(size, triangle.device)
    Q = F.pad(triangle, (1, 0)).index_select(1, at).view(-1, size, size)
    return Q - Q.mT


class _Skew(KernelFunction):
    """Q[i, j] = −Q[j, i] = triangle[place of (i, j)], by one gather each way."""

    @staticmethod
    def forward(ctx: Context, triangle: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(_places(size, triangle.device)[0])
        return _skew(triangle, size)

    @staticmethod
    def backward(ctx: Context, dQ: Tensor) -> Grads:
        (upper,) = ctx.saved_tensors
        return (dQ - dQ.mT).flatten(1).index_select(1, upper), None


@functools.lru_cache(maxsize=16)
def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the upper triangle in a flat matrix, and of a matrix's entries in a triangle with a zero
    before it.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=device)
    upper = rows * size + columns
    at = torch.zeros(size * size, dtype=torch.int64, device=device)
    return upper, at.index_copy(0, upper, torch.arange(1, len(upper) + 1, device=device))


def cayley(Q: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹ of skew-symmetric blocks, orthogonal."""
    eye = torch.eye(Q.shape[-1], dtype=torch.float32, device=Q.device)
    wide = Q.float()
    # X (I + Q) = I − Q; transposed (I − Q) Xᵀ = I + Q.
    R: Tensor = torch.linalg.solve(eye - wide, eye + wide).mT.to(Q.dtype)
    return R


def near_zero(Q: Tensor, distance: float) -> Tensor:
    """Scale each of n blocks [n, b, b] down to a norm of `distance` / √n at most."""
    most = distance / len(Q) ** 0.5
    norm = torch.linalg.matrix_norm(Q, keepdim=True)
    return torch.where(norm <= most, Q, most * Q / norm)
