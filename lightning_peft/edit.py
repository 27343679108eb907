"""Edit: the normal form of every weight method.

W' = diag(out_scale) · (W + Σ terms) · Rᵀ · diag(in_scale);   b' = (b + Δb) [· out_scale if
scale_bias]

acting on x as   y = out_scale ∘ ((x ∘ in_scale) R (W + Σ terms)ᵀ) + b'.

A method lowers to an Edit; a layer applies it; a storage holds the W it is applied to. Composition
is an onion: W_k = edit_k(W_{k−1}), so that forward, merge and rows under different adapters agree
by construction. W is canonical, [*batch, out, in]; batch is the expert axis and usually absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_peft.site import LayerOps, Site

__all__ = ["Dense", "Edit", "Kron", "LowRank", "NotMergeable", "Rotation", "Term"]


class NotMergeable(RuntimeError):
    """Raised by `Term.matrix` when the change depends on the input, with the reason."""


class Term(Protocol):
    """An additive change ΔW of the weight."""

    def matrix(self) -> Tensor:
        """ΔW [*batch, out, in]; raises NotMergeable when it depends on the input."""
        ...

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """ΔW acting on x, in the cheapest exact form."""
        ...


@dataclass(frozen=True)
class LowRank:
    """ΔW = scaling · B A with A [*batch, r, in], B [*batch, out, r]."""

    A: Tensor
    B: Tensor
    scaling: float | Tensor = 1.0

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        return self.scaling * (self.B @ self.A)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products."""
        return ops.low_rank(site.module, _cast(x, self.A), self.A, self.B, self.scaling)


@dataclass(frozen=True)
class Dense:
    """ΔW given as a whole: for methods whose change has no cheaper exact form."""

    delta: Tensor

    def matrix(self) -> Tensor:
        """ΔW."""
        return self.delta

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """The layer's own op with ΔW for a weight."""
        W = ops.from_matrix(site.module, site.parameter, self.delta)
        return ops.op(site.module, _cast(x, self.delta), W, None)


@dataclass(frozen=True)
class Kron:
    """ΔW = scaling · C ⊗ D with C [a, c], D [b, d], out = a·b, in = c·d."""

    C: Tensor
    D: Tensor
    scaling: float | Tensor = 1.0

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        return self.scaling * torch.kron(self.C, self.D)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Vec identity: (C ⊗ D) x = C · X · Dᵀ with x read as X [c, d]."""
        if not ops.supports("rotation"):  # not a plain [..., in] input: convolution or embedding
            return Dense(self.matrix()).apply(ops, site, x)
        c, d = self.C.shape[1], self.D.shape[1]
        X = _cast(x, self.C).reshape(*x.shape[:-1], c, d)
        y: Tensor = self.scaling * (self.C @ (X @ self.D.mT)).flatten(-2)
        return y


@dataclass(frozen=True)
class Rotation:
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
    x = _cast(x, blocks)
    if permutation is not None:
        x = x[..., permutation]
    n, k, _ = blocks.shape
    x = torch.einsum("...nj,njk->...nk", x.reshape(*x.shape[:-1], n, k), blocks).flatten(-2)
    if permutation is not None:
        x = x[..., torch.argsort(permutation)]
    return x


@dataclass(frozen=True)
class Edit:
    """A change of one weight in normal form; every part is optional.

    Attributes:
        terms: Additive changes of W.
        in_scale: [channels], multiplies the input.
        out_scale: [out], multiplies the output.
        rotation: Rotates the input.
        bias: Δb [out], added to the bias.
        scale_bias: Whether `out_scale` multiplies the bias too (IA3 does, DoRA does not).
        dropout: Probability of dropping an element of the input of `terms`, in training.
    """

    terms: tuple[Term, ...] = ()
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    rotation: Rotation | None = None
    bias: Tensor | None = None
    scale_bias: bool = False
    dropout: float = 0.0

    def matrix(self, W: Tensor, ops: LayerOps, site: Site) -> Tensor:
        """W' [*batch, out, in]; what merge writes."""
        for term in self.terms:
            delta = term.matrix()
            W = W.to(torch.promote_types(W.dtype, delta.dtype)) + delta
        if self.rotation is not None:
            W = self.rotation.matrix(W)
        if self.in_scale is not None:
            W = ops.scale_in_matrix(site.module, W, self.in_scale)
        if self.out_scale is not None:
            W = self.out_scale.unsqueeze(-1) * W
        return W

    def edited_bias(self, b: Tensor | None) -> Tensor | None:
        """b' [out]; None where there is neither a bias nor a change of it."""
        if self.bias is not None:
            b = self.bias if b is None else b + self.bias
        if b is not None and self.scale_bias and self.out_scale is not None:
            b = b * self.out_scale
        return b

    def form(self) -> frozenset[str]:
        """Names of the parts that are present: what a kernel is chosen by."""
        parts = {name for name in _PARTS if getattr(self, name) is not None}
        if self.terms:
            parts.add("low_rank" if all(isinstance(t, LowRank) for t in self.terms) else "terms")
        if self.dropout:
            parts.add("dropout")
        return frozenset(parts)

    @property
    def only_low_rank(self) -> bool:
        """Whether the Edit is a sum of LowRank terms and nothing else (dropout allowed)."""
        return (
            self.in_scale is None
            and self.out_scale is None
            and self.rotation is None
            and self.bias is None
            and bool(self.terms)
            and all(isinstance(t, LowRank) for t in self.terms)
        )


_PARTS = ("in_scale", "out_scale", "rotation", "bias")


def stacked(terms: Sequence[LowRank]) -> LowRank:
    """One LowRank equal to the sum of several, stacked along the rank."""
    if len(terms) == 1:
        return terms[0]
    A = torch.cat([t.A for t in terms], dim=-2)
    B = torch.cat([t.scaling * t.B for t in terms], dim=-1)
    return LowRank(A, B, 1.0)


def _cast(x: Tensor, like: Tensor) -> Tensor:
    """The one dtype rule: autocast's dtype where it is on, else the adapter's; ids stay ids."""
    if (
        x.dtype == like.dtype
        or not x.is_floating_point()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return x
    return x.to(like.dtype)
