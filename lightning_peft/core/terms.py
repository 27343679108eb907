"""Terms of an Edit: additive changes ΔW, each in its cheapest exact form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.input_dtype import to_adapter_dtype

if TYPE_CHECKING:
    from lightning_peft.core.protocols import LayerOps
    from lightning_peft.core.site import Site

__all__ = [
    "Dense",
    "Folds",
    "FormedTerm",
    "FrozenDown",
    "FusedLinearTerm",
    "Grouped",
    "GroupedTerm",
    "Kronecker",
    "LowRank",
    "NotMergeable",
    "Term",
    "as_low_rank",
    "changes_weight",
    "concat_ranks",
]


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
        return ops.low_rank(site.module, to_adapter_dtype(x, self.A), self.A, self.B, self.scaling)

    def add_grouped(self, y: Tensor, x: Tensor, grouped: Grouped) -> Tensor:
        """Two thin products."""
        return grouped.add_low_rank(y, x, self.A, self.B, self.scaling)


class FusedLinearTerm(Protocol):
    """A term that knows a shorter way on a plain dense linear layer than base call and `apply`."""

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """X Wᵀ + b and the change, W and b frozen, everything in one dtype."""
        ...


class Grouped(Protocol):
    """Products of rows sorted by expert with weights of their own."""

    def product(self, x: Tensor, W: Tensor, times: int = 1) -> Tensor:
        """X W[e]ᵀ with x [S·times, in], `times` neighbours a row, W [E, out, in] or one [out, in]
        for all → [S·times, out].
        """
        ...

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        """y + scaling · x A[e]ᵀ B[e]ᵀ; y [S, out] may be written over."""
        ...


class GroupedTerm(Protocol):
    """A term that acts on rows sorted by expert in products, without forming ΔW [E, out, in]."""

    def add_grouped(self, y: Tensor, x: Tensor, grouped: Grouped) -> Tensor:
        """y [S, out] with ΔW[e] acting on x [S, in] added; y may be written over."""
        ...


class Folds(Protocol):
    """A term that is a LowRank once its factors are multiplied out."""

    def to_low_rank(self) -> LowRank:
        """Return the change as a LowRank with its factors multiplied out."""
        ...


def changes_weight(term: Term) -> bool:
    """Whether a term is more than zeros; False on meta and without a matrix: nothing is known."""
    try:
        thin = as_low_rank(term)
        parts = (term.matrix(),) if thin is None else (thin.A, thin.B)
    except NotMergeable:
        return False
    return all(not t.is_meta and bool(t.any()) for t in parts)


def as_low_rank(term: Term) -> LowRank | None:
    """The term as a LowRank; None where it is none."""
    if isinstance(term, LowRank):
        return term
    return term.to_low_rank() if hasattr(term, "to_low_rank") else None


@dataclass(frozen=True)
class Dense:
    """ΔW given as a whole: for methods whose change has no cheaper exact form."""

    delta: Tensor

    #: ΔW exists anyway: one product with W + ΔW is cheaper than one with each.
    formed: ClassVar[bool] = True

    def matrix(self) -> Tensor:
        """ΔW."""
        return self.delta

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """x (W + ΔW)ᵀ + b: three products per step where base and change apart take five."""
        return F.linear(x, W + self.delta, b)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """The layer's own op with ΔW for a weight."""
        W = ops.from_canonical(site.module, site.parameter, self.delta)
        return ops.functional(site.module, to_adapter_dtype(x, self.delta), W, None)


class FormedTerm(Term):
    """Base of terms whose ΔW exists anyway: one product with W + ΔW is cheaper than one each."""

    formed: ClassVar[bool] = True

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """The layer's own op with ΔW for a weight."""
        return Dense(self.matrix()).apply(ops, site, x)

    def fused_linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """One product with W + ΔW."""
        return F.linear(x, W + self.matrix(), b)


@dataclass(frozen=True)
class FrozenDown:
    """A LowRank whose A is frozen: its input is needed for no gradient and is not kept."""

    low_rank: LowRank

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        return self.low_rank.matrix()

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products; autograd keeps the thin activations alone."""
        return self.low_rank.apply(ops, site, x)

    def add_grouped(self, y: Tensor, x: Tensor, grouped: Grouped) -> Tensor:
        """Two thin products."""
        return self.low_rank.add_grouped(y, x, grouped)


@dataclass(frozen=True)
class Kronecker:
    """ΔW = scaling · C ⊗ D with C [*batch, a, c], D [*batch, b, d], out = a·b, in = c·d."""

    C: Tensor
    D: Tensor
    scaling: float | Tensor = 1.0

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        if self.C.ndim == 2:
            # torch.kron views its result by shape, which fails on some strides.
            return self.scaling * torch.kron(self.C.contiguous(), self.D.contiguous())
        product = torch.einsum("...ac,...bd->...abcd", self.C, self.D)
        return self.scaling * product.flatten(-4, -3).flatten(-2)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """The vec identity: (C ⊗ D) x = C · X · Dᵀ with x read as X [c, d]."""
        if not ops.features_last:  # of a convolution or an embedding
            return Dense(self.matrix()).apply(ops, site, x)
        c, d = self.C.shape[1], self.D.shape[1]
        X = to_adapter_dtype(x, self.C).reshape(*x.shape[:-1], c, d)
        y: Tensor = self.scaling * (self.C @ (X @ self.D.mT)).flatten(-2)
        return y

    def add_grouped(self, y: Tensor, x: Tensor, grouped: Grouped) -> Tensor:
        """Apply the Kronecker product to grouped rows, one factor at a time."""
        (b, d), (a, c) = self.D.shape[-2:], self.C.shape[-2:]
        half = grouped.product(x.reshape(-1, d), self.D, c).view(-1, c, b).mT.reshape(-1, c)
        change = grouped.product(half, self.C, b).view(-1, b, a).mT.reshape(-1, a * b)
        return y + (self.scaling * change).to(y.dtype)


def concat_ranks(terms: Sequence[LowRank]) -> LowRank:
    """One LowRank equal to the sum of several, stacked along the rank."""
    if len(terms) == 1:
        return terms[0]
    A = torch.cat([t.A for t in terms], dim=-2)
    B = torch.cat([t.scaling * t.B for t in terms], dim=-1)
    return LowRank(A, B, 1.0)
