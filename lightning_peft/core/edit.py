"""Edit: the normal form of every weight method.

W' = M · diag(out_scale) · (W + Σ terms) · Rᵀ · diag(in_scale);   b' = M · (b + Δb) [· out_scale
if scale_bias]

acting on x as   y = M (out_scale ∘ ((x ∘ in_scale) R (W + Σ terms)ᵀ)) + b', M the output map.

A method lowers to an Edit; a layer applies it; a storage holds the W it is applied to. Composition
is an onion: W_k = edit_k(W_{k−1}), so that forward, merge and rows under different adapters agree
by construction. W is canonical, [*batch, out, in]; batch is the expert axis and usually absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from lightning_peft_kernels.autograd import Context, Grads, KernelFunction, in_functorch_transform
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from lightning_peft.core.protocols import LayerOps
    from lightning_peft.core.site import Site

__all__ = [
    "BlockRotation",
    "Dense",
    "Edit",
    "Folds",
    "FrozenDown",
    "FusedLinearTerm",
    "Grouped",
    "GroupedTerm",
    "Kronecker",
    "LowRank",
    "NotMergeable",
    "OutMap",
    "Rotation",
    "Term",
    "apply_edits",
    "as_low_rank",
    "concat_ranks",
    "low_rank_terms",
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
        return ops.low_rank(site.module, _cast(x, self.A), self.A, self.B, self.scaling)

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
        """The same change."""
        ...


def as_low_rank(term: Any) -> LowRank | None:
    """The term as a LowRank; None where it is none."""
    if isinstance(term, LowRank):
        return term
    return term.to_low_rank() if hasattr(term, "to_low_rank") else None


def low_rank_terms(edits: Sequence[Edit]) -> list[LowRank]:
    """The terms of several edits that are a LowRank, in order."""
    # A loop: torch.compile does not follow an assignment inside a comprehension.
    found = []
    for edit in edits:
        for term in edit.terms:
            low_rank = as_low_rank(term)
            if low_rank is not None:
                found.append(low_rank)
    return found


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
        return ops.functional(site.module, _cast(x, self.delta), W, None)


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
            return self.scaling * torch.kron(self.C, self.D)
        product = torch.einsum("...ac,...bd->...abcd", self.C, self.D)
        return self.scaling * product.flatten(-4, -3).flatten(-2)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Vec identity: (C ⊗ D) x = C · X · Dᵀ with x read as X [c, d]."""
        if not ops.features_last:  # a convolution or an embedding
            return Dense(self.matrix()).apply(ops, site, x)
        c, d = self.C.shape[1], self.D.shape[1]
        X = _cast(x, self.C).reshape(*x.shape[:-1], c, d)
        y: Tensor = self.scaling * (self.C @ (X @ self.D.mT)).flatten(-2)
        return y

    def add_grouped(self, y: Tensor, x: Tensor, grouped: Grouped) -> Tensor:
        """The same: rows of X, then columns, are the rows of a product."""
        (b, d), (a, c) = self.D.shape[-2:], self.C.shape[-2:]
        half = grouped.product(x.reshape(-1, d), self.D, c).view(-1, c, b).mT.reshape(-1, c)
        change = grouped.product(half, self.C, b).view(-1, b, a).mT.reshape(-1, a * b)
        return y + (self.scaling * change).to(y.dtype)


class Rotation(Protocol):
    """A linear map R of the input, orthogonal where the method makes it so."""

    def apply(self, x: Tensor) -> Tensor:
        """x R over the last axis."""
        ...

    def matrix(self, W: Tensor) -> Tensor:
        """W Rᵀ."""
        ...


class OutMap(Protocol):
    """A linear map M of the output and its bias; on the weight it acts column by column."""

    def apply(self, y: Tensor) -> Tensor:
        """M y over the last axis."""
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
    x = _cast(x, blocks)
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
            # x itself is kept, not the permuted: this backward may be differentiated again.
            x = x.index_select(-1, order[0]) if order else x
            X, G = (t.reshape(-1, n, k).transpose(0, 1) for t in (x, dY))
            dB = torch.bmm(X.mT, G)
        return dX, dB, None


def _by_stretches(x: Tensor, blocks: Tensor) -> Tensor:
    n, k, _ = blocks.shape
    y = torch.bmm(x.reshape(-1, n, k).transpose(0, 1), blocks)
    return y.transpose(0, 1).reshape(x.shape)


@dataclass(frozen=True)
class Edit:
    """A change of one weight in normal form; every part is optional.

    Attributes:
        terms: Additive changes of W.
        in_scale: [channels], multiplies the input.
        out_scale: [out], multiplies the output.
        rotation: Rotates the input.
        out_map: Maps the output, after everything else.
        bias: Δb [out], added to the bias.
        scale_bias: Whether `out_scale` multiplies the bias too (IA3 does, DoRA does not).
        dropout: Probability of dropping an element of the input of `terms`, in training.
    """

    terms: tuple[Term, ...] = ()
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    rotation: Rotation | None = None
    out_map: OutMap | None = None
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
        if self.out_map is not None:
            W = self.out_map.apply(W.mT).mT
        return W

    def edited_bias(self, b: Tensor | None) -> Tensor | None:
        """b' [out]; None where there is neither a bias nor a change of it."""
        if self.bias is not None:
            b = self.bias if b is None else b + self.bias
        if b is not None and self.scale_bias and self.out_scale is not None:
            b = b * self.out_scale
        if b is not None and self.out_map is not None:
            b = self.out_map.apply(b)
        return b

    def form(self) -> frozenset[str]:
        """Names of the parts that are present: what a kernel is chosen by."""
        parts = {name for name in _PARTS if getattr(self, name) is not None}
        if self.terms:
            parts.add("low_rank" if self._all_low_rank else "terms")
        if self.dropout:
            parts.add("dropout")
        return frozenset(parts)

    @property
    def only_low_rank(self) -> bool:
        """Whether the Edit is a sum of LowRank terms and nothing else (dropout allowed)."""
        return self._only_terms and len(self.terms) > 0 and self._all_low_rank

    @property
    def _only_terms(self) -> bool:  # spelled out: asked for in every forward of every layer
        return (
            self.in_scale is None
            and self.out_scale is None
            and self.rotation is None
            and self.out_map is None
            and self.bias is None
        )

    @property
    def fused_linear_term(self) -> Any:
        """The term, where it is all there is and knows a shorter way on a linear layer; else None.
        Dropout would come between.
        """
        if len(self.terms) != 1 or not hasattr(self.terms[0], "fused_linear") or self.dropout:
            return None
        return self.terms[0] if self._only_terms else None

    @property
    def on_experts(self) -> bool:
        """Whether it acts on rows sorted by expert; else W' of all experts is formed."""
        mapped = self.rotation is not None or self.out_map is not None
        return not mapped and all(hasattr(t, "add_grouped") for t in self.terms)

    @property
    def _all_low_rank(self) -> bool:
        if len(self.terms) == 1 and type(self.terms[0]) is LowRank:  # nearly always
            return True
        return all(isinstance(t, LowRank) or hasattr(t, "to_low_rank") for t in self.terms)


_PARTS = ("in_scale", "out_scale", "rotation", "out_map", "bias")


def concat_ranks(terms: Sequence[LowRank]) -> LowRank:
    """One LowRank equal to the sum of several, stacked along the rank."""
    if len(terms) == 1:
        return terms[0]
    A = torch.cat([t.A for t in terms], dim=-2)
    B = torch.cat([t.scaling * t.B for t in terms], dim=-1)
    return LowRank(A, B, 1.0)


def apply_edits(site: Site, edits: Sequence[Edit], W: Tensor | None = None) -> Tensor:
    """Return the canonical weight [*batch, out, in] after `edits`, applied in order.

    Args:
        site: The weight; read through its storage if `W` is None.
        edits: First applied first.
        W: Canonical weight to start from.
    """
    M = site.weight() if W is None else W
    for edit in edits:
        M = edit.matrix(M, site.ops, site)
    return M


def _cast(x: Tensor, like: Tensor) -> Tensor:
    """The one dtype rule: autocast's dtype where it is on, else the adapter's; ids stay ids."""
    if (
        x.dtype == like.dtype
        or not x.is_floating_point()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return x
    return x.to(like.dtype)
