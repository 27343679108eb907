"""A small matrix that all stretches of the input share, in one product per side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, check_no_double_backward
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense, Grouped, Term

__all__ = ["Tiled"]


@dataclass(frozen=True)
class Tiled(Term):
    """ΔW[o, i] = D[i mod r, o] with D [*batch, r, out]: stretches of the input are summed first."""

    D: Tensor
    site: Site

    def matrix(self) -> Tensor:
        """ΔW, tiled."""
        width = self.site.in_features
        times = -(-width // self.D.shape[-2])
        return self.D.mT.repeat(*(1,) * (self.D.ndim - 1), times)[..., :width]

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """(Σ_j x_j) D over stretches x_j of length r."""
        if self.D.ndim > 2 or not ops.features_last:
            return Dense(self.matrix()).apply(ops, site, x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.D.dtype)
        y: Tensor = _stretches(x, self.D.shape[0]) @ self.D
        return y

    def add_grouped(self, y: Tensor, x: Tensor, grouped: Grouped) -> Tensor:
        """Y + (Σ_j x_j) D[e]."""
        return y + grouped.product(_stretches(x, self.D.shape[-2]), self.D.mT).to(y.dtype)

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Base and change in one function."""
        y: Tensor = _TiledLinear.apply(x, W, b, self.D)
        return y


def _stretches(x: Tensor, r: int) -> Tensor:
    """Σ_j x_j [..., r]; the last stretch may be short."""
    rest = x.shape[-1] % r
    whole = x[..., : x.shape[-1] - rest] if rest else x
    s: Tensor = whole.reshape(*x.shape[:-1], whole.shape[-1] // r, r).sum(-2)
    # Not by padding x, which would copy all of it.
    return s + F.pad(x[..., -rest:], (0, r - rest)) if rest else s


class _TiledLinear(KernelFunction):
    """Y = X Wᵀ + b + S D with S = Σ_j X_j [M, r], W and b frozen.

    dS = dY Dᵀ is added to every stretch of dX = dY W in place; dD = Sᵀ dY.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, W: Tensor, b: Tensor | None, D: Tensor) -> Tensor:
        y = F.linear(x, W, b)
        S = _stretches(x.reshape(-1, x.shape[-1]), D.shape[0])
        ctx.save_for_backward(W, D, S)
        if torch.compiler.is_compiling():  # not in place: see the kernels' `added`
            return y + (S @ D).view(y.shape)
        y.view(-1, y.shape[-1]).addmm_(S, D)
        return y

    @staticmethod
    def backward(ctx: Context, dY: Tensor) -> Grads:
        check_no_double_backward("MiSS", 'its input is not kept: use kernels="torch"')
        W, D, S = ctx.saved_tensors
        dY2 = dY.reshape(-1, dY.shape[-1])
        dX = None
        if ctx.needs_input_grad[0]:
            dX, dS, r = dY2 @ W, dY2 @ D.mT, D.shape[0]
            rest = dX.shape[1] % r
            stretches = dX[:, : dX.shape[1] - rest] if rest else dX
            stretches.view(len(dX), stretches.shape[1] // r, r).add_(dS.unsqueeze(1))
            if rest:
                dX[:, -rest:].add_(dS[:, :rest])
            dX = dX.view(*dY.shape[:-1], dX.shape[1])
        return dX, None, None, S.mT @ dY2
