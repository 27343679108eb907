"""Rotations of a layer's input, as block-diagonal products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, in_functorch_transform
from torch import Tensor

from lightning_peft.core.input_dtype import to_adapter_dtype

__all__ = ["BlockRotation", "Rotation", "nearest_divisor", "neumann"]


class Rotation(Protocol):
    """A linear map R of the input, orthogonal where the method makes it so."""

    def apply(self, x: Tensor) -> Tensor:
        """x R over the last axis."""
        ...

    def matrix(self, W: Tensor) -> Tensor:
        """W Rᵀ."""
        ...


@dataclass(frozen=True)
class BlockRotation:
    """R = R₁ R₂ … with R_i = Pᵢ · blockdiag(blocksᵢ) · Pᵢᵀ; orthogonal where the method makes it
    so.

    Attributes:
        stages: Pairs (permutation or None, blocks [n, k, k]); n·k = in. A permutation is an index
            tensor [in].
    """

    stages: tuple[tuple[Tensor | None, Tensor], ...]

    def apply(self, x: Tensor) -> Tensor:
        """X R over the last axis."""
        for permutation, blocks in self.stages:
            x = _block_product(x, blocks, permutation)
        return x

    def matrix(self, W: Tensor) -> Tensor:
        """W Rᵀ."""
        for permutation, blocks in reversed(self.stages):
            W = _block_product(W, blocks.mT, permutation)
        return W


def _block_product(x: Tensor, blocks: Tensor, permutation: Tensor | None) -> Tensor:
    x = to_adapter_dtype(x, blocks)
    if (
        torch.is_autocast_enabled(x.device.type)
        or x.dtype != blocks.dtype
        or in_functorch_transform()
    ):
        return _block_product_by_torch(x, blocks, permutation)
    y: Tensor = _BlockProduct.apply(x, blocks, permutation)
    return y


def _block_product_by_torch(x: Tensor, blocks: Tensor, permutation: Tensor | None) -> Tensor:
    n, k, _ = blocks.shape
    if permutation is not None:
        x = x[..., permutation]
    y = torch.einsum("...nj,njk->...nk", x.reshape(*x.shape[:-1], n, k), blocks).flatten(-2)
    return y if permutation is None else y[..., torch.argsort(permutation)]


class _BlockProduct(KernelFunction):
    """Y_n = X_n B_n by stretches X_n of the last axis (permuted), blocks B [n, k, k]: dX_n = dY_n
    B_nᵀ, dB_n = X_nᵀ dY_n. One copy each way, from [n, M, k] to [M, n k]; a permutation is undone
    by a gather, where torch's own backward would scatter.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, blocks: Tensor, permutation: Tensor | None) -> Tensor:
        if permutation is None:
            ctx.save_for_backward(x, blocks)
            return _by_stretches(x, blocks)
        inverse = torch.argsort(permutation)
        ctx.save_for_backward(x, blocks, permutation, inverse)
        return _by_stretches(x.index_select(-1, permutation), blocks).index_select(-1, inverse)

    @staticmethod
    def backward(ctx: Context, dY: Tensor) -> Grads:
        x, blocks, *order = ctx.saved_tensors
        n, k, _ = blocks.shape
        dY = dY.index_select(-1, order[0]) if order else dY
        dX = dB = None
        if ctx.needs_input_grad[0]:
            dX = _by_stretches(dY, blocks.mT)
            dX = dX.index_select(-1, order[1]) if order else dX
        if ctx.needs_input_grad[1]:
            # x itself is kept, not its permutation: this backward may be differentiated again.
            x = x.index_select(-1, order[0]) if order else x
            X, G = (t.reshape(-1, n, k).transpose(0, 1) for t in (x, dY))
            dB = torch.bmm(X.mT, G)
        return dX, dB, None


def _by_stretches(x: Tensor, blocks: Tensor) -> Tensor:
    n, k, _ = blocks.shape
    y = torch.bmm(x.reshape(-1, n, k).transpose(0, 1), blocks)
    return y.transpose(0, 1).reshape(x.shape)


def neumann(Q: Tensor, terms: int) -> Tensor:
    """(I + Q)(I − Q)⁻¹ as a series: I + 2Q + 2Q² + … + Qⁿ, `terms` terms in all.

    3 terms are computed as 4, as in peft.
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if terms == 5:  # (I + Q²)(I + 2Q + Q²): two products instead of three
        square = Q @ Q
        half = torch.add(eye + square, Q, alpha=2)
        return torch.baddbmm(half, square, half) if Q.ndim == 3 else torch.addmm(half, square, half)
    R, power = eye.expand_as(Q), Q
    terms = 4 if terms == 3 else terms
    for i in range(1, terms):
        power = power if i == 1 else power @ Q
        last = i == terms - 1 and i > 1
        R = torch.add(R, power, alpha=1 if last else 2)
    return R


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n closest to `wanted`; the smaller of two."""
    wanted, distance = min(wanted, n), 0
    while True:  # outwards: most often none
        for d in (wanted - distance, wanted + distance):
            if 1 <= d <= n and n % d == 0:
                return d
        distance += 1
