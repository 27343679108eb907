"""VeRA: low rank with random frozen factors that all layers share, two vectors a layer trained.
Kopiczko et al. 2023, arXiv:2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, check_no_double_backward
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.edit import Edit
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, Term
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import empty_like_site, require, require_bias
from lightning_peft.methods.exchange import config_keys
from lightning_peft.methods.registry import register

__all__ = ["VeRA", "Vectors"]


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


@register
@dataclass(frozen=True)
class VeRA(WeightMethod):
    """ΔW = diag(b) B diag(d) A: A [r, in], B [out, r] sliced from one frozen pair, b and d trained.

    Attributes:
        r: Rank of the shared factors; may exceed a layer's size.
        d_initial: Start of d; b starts at zero.
        seed: Seed of the shared factors: Kaiming-uniform, A then B, from a separate generator.
        dropout: Probability of dropping an input element of the branch, in training.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"vera_only"``.

    Raises:
        ValueError: r < 1, dropout outside [0, 1).
    """

    r: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"

    hf = HFFormat(
        peft_type="VERA",
        tensors={"b": "vera_lambda_b", "d": "vera_lambda_d"},
        prefix={"A": "base_model.vera_A", "B": "base_model.vera_B"},
        optional=("A", "B"),
        axes={"b": ""},
        config=config_keys(
            "bias", "r", "d_initial", seed="projection_prng_key", dropout="vera_dropout"
        ),
        own_defaults=True,
        fixed={"save_projection": True},
        inert={"fan_in_fan_out": False},
        defaults={"save_projection": True},
        ignored=("init_weights",),
        kinds=("Linear", "Conv1D"),
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_bias(self.label, self.bias, "vera_only")
        require(self.r >= 1, f"{self.label}: expected r >= 1, got r = {self.r}")
        require(
            0.0 <= self.dropout < 1.0,
            f"{self.label}: expected 0 <= dropout < 1, got dropout = {self.dropout}",
        )

    def shared_buffers(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """A [r, largest in], B [largest out, r], frozen."""
        device = "meta" if sites[0].device.type == "meta" else "cpu"
        generator = torch.Generator("cpu").manual_seed(self.seed)
        width = max(site.in_features for site in sites)
        height = max(site.out_features for site in sites)
        factors = {}
        for name, shape in (("A", (self.r, width)), ("B", (height, self.r))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            t = torch.empty(shape, device=device)
            factors[name] = t if t.is_meta else t.uniform_(-bound, bound, generator=generator)
        return factors

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """b [out] zeros, d [r] at d_initial."""
        return {
            "b": empty_like_site(site, site.out_features).zero_(),
            "d": empty_like_site(site, self.r).fill_(self.d_initial),
        }

    def trained_biases(self) -> str:
        """As `bias` says."""
        return self.bias if self.bias in ("none", "all") else "adapted"

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change; a stack of matrices has its vectors multiplied into the factors."""
        b, d = p["b"], p["d"]
        *batch, out_features, in_features = site.shape
        A, B = p["A"], p["B"]
        if A.shape[1] != in_features:
            A = A.narrow(1, 0, in_features)
        if B.shape[0] != out_features:
            B = B.narrow(0, 0, out_features)
        A, B = A.to(d), B.to(b)
        term = Vectors(A, B, d, b)
        return Edit(terms=(term.to_low_rank() if batch else term,), dropout=self.dropout)
