"""Frozen thin factors with a trained vector behind each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, check_no_double_backward
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, Term

__all__ = ["Vectors"]


@dataclass(frozen=True)
class Vectors(Term):
    """ΔW = diag(b) B diag(d) A with A [r, in], B [out, r] frozen, d [r], b [out]."""

    A: Tensor
    B: Tensor
    d: Tensor
    b: Tensor

    def to_low_rank(self) -> LowRank:
        """The vectors multiplied into the thin factors."""
        return LowRank(self.d.unsqueeze(-1) * self.A, self.b.unsqueeze(-1) * self.B)

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        return self.to_low_rank().matrix()

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products."""
        return self.to_low_rank().apply(ops, site, x)

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Base and change in one function."""
        y: Tensor = _VectorsLinear.apply(x, W, b, self.A, self.B, self.d, self.b)
        return y


class _VectorsLinear(KernelFunction):
    """Y = X Wᵀ + bias + V diag(b) with V = (X Aᵀ diag(d)) Bᵀ [M, out]; only d, b are trained.

    No product makes a gradient of A or B: db = Σ dY ∘ V, and with G = dY diag(b) B [M, r]
    dd = Σ G ∘ X Aᵀ, dX = dY W + G diag(d) A.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor,
        b: Tensor,
    ) -> Tensor:
        y = F.linear(x, W, bias)
        U = F.linear(x, A)
        V = F.linear(U * d, B)
        ctx.save_for_backward(W, A, B, d, b, U, V)
        # Not in place while compiling: see the kernels' `added`.
        return y.addcmul(V, b) if torch.compiler.is_compiling() else y.addcmul_(V, b)

    @staticmethod
    def backward(ctx: Context, dY: Tensor) -> Grads:
        check_no_double_backward("VeRA", 'its input is not kept: use kernels="torch"')
        W, A, B, d, b, U, V = ctx.saved_tensors
        dY2, U, V = (t.reshape(-1, t.shape[-1]) for t in (dY, U, V))
        db = torch.linalg.vecdot(dY2, V, dim=0)
        G = dY2 @ (b.unsqueeze(-1) * B)
        dd = torch.linalg.vecdot(G, U, dim=0)
        dX = None
        if ctx.needs_input_grad[0]:
            dX = (dY2 @ W).addmm_(G * d, A)
            dX = dX.view(*dY.shape[:-1], dX.shape[-1])
        return dX, None, None, None, None, dd, db
