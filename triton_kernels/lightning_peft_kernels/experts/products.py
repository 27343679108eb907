"""Grouped products of rows sorted by expert, and their gradients, with dense weights.

`torch.nn.functional.grouped_mm` does most of the work. The CPU also has faster forms for experts
with few rows, and skips idle experts if most are idle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft_kernels.experts.cpu_pairs import pairs_are_faster, product_in_pairs
from lightning_peft_kernels.experts.groups import ActiveExperts, GroupLayout, read_counts
from lightning_peft_kernels.registration import define_op

__all__ = [
    "grouped_product",
    "grouped_weight_gradient",
    "library_product",
    "library_weight_gradient",
    "unassigned_rows",
]

# Experts per active expert from which one product per active expert beats the library's product:
# 0.2 to 1.0 of its time, gradients included (2 threads, fp32 and bf16, 16 to 256 experts of
# 128 × 64 and 256 × 256).
_IDLE = 4


def grouped_product(X: Tensor, W: Tensor, layout: GroupLayout) -> Tensor:
    """Compute X[rows of e] · W[e]ᵀ with W [E, N, K]; unassigned rows give zeros.

    A CPU multiplies two experts at once if that is faster. The library computes the other products,
    except shapes that it does not accept and layers whose experts are mostly idle: these run one
    product per active expert.
    """
    active = layout.active
    if active is not None and pairs_are_faster(X, W, len(active.experts)):
        return product_in_pairs(X, W.mT, active.batches(2))
    aligned = active is None or not _unaligned(X, W)
    if X.dtype != torch.float64 and aligned and not _mostly_idle(X, W.shape[0], active):
        return library_product(X, W, layout.offsets, has_unassigned_rows=layout.has_unassigned_rows)
    active = active or ActiveExperts(read_counts(layout.offsets))
    (*rows, unassigned), across = active.split(X), W.mT
    if torch.is_grad_enabled():  # autograd cannot record a write into `out`
        parts = [torch.mm(x, across[e]) for e, x in zip(active.experts, rows, strict=True)]
        return torch.cat([*parts, X.new_zeros(len(unassigned), W.shape[1])])
    Y = X.new_empty(X.shape[0], W.shape[1])
    *each, rest = active.split(Y)
    for e, x, y in zip(active.experts, rows, each, strict=True):
        torch.mm(x, across[e], out=y)
    rest.zero_()
    return Y


def grouped_weight_gradient(dY: Tensor, X: Tensor, layout: GroupLayout) -> Tensor:
    """Compute dW [E, N, K] = dY[rows of e]ᵀ X[rows of e]; zero for an expert without rows."""
    active = layout.active
    unit, experts = 16 // X.element_size(), layout.offsets.shape[0]
    aligned = not (dY.shape[1] % unit or X.shape[1] % unit)
    accepted = X.dtype != torch.float64 and (active is None or aligned)
    if accepted and not _mostly_idle(X, experts, active):
        return library_weight_gradient(dY, X, layout.offsets)
    active = active or ActiveExperts(read_counts(layout.offsets))
    pairs = zip(active.split(dY), active.split(X), strict=True)
    if torch.is_grad_enabled():
        dW = {e: torch.mm(g.mT, x) for e, (g, x) in zip(active.experts, pairs, strict=False)}
        none = X.new_zeros(dY.shape[1], X.shape[1])
        return torch.stack([dW.get(e, none) for e in range(experts)])
    total = X.new_zeros(experts, dY.shape[1], X.shape[1])
    for e, (g, x) in zip(active.experts, pairs, strict=False):
        torch.mm(g.mT, x, out=total[e])
    return total


def _mostly_idle(X: Tensor, experts: int, active: ActiveExperts | None) -> bool:
    """Whether so many experts have no rows that the library, which visits all, is slower.

    Always False if autograd records the product.
    """
    if active is None or torch.is_grad_enabled() or X.device.type != "cpu":
        return False
    return experts >= len(active.experts) * _IDLE


def unassigned_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return [S, 1], True if a row belongs to no expert."""
    row = torch.arange(rows, device=offsets.device)
    return (row >= offsets[-1]).unsqueeze(-1)


def library_product(X: Tensor, W: Tensor, offsets: Tensor, *, has_unassigned_rows: bool) -> Tensor:
    """Multiply X [S, K] by W [E, N, K] with `grouped_mm`, padded to rows of full 16 bytes.

    Unassigned rows give zeros.
    """
    N, K = W.shape[1:]
    unit = 16 // X.element_size()
    if K % unit:
        X, W = F.pad(X, (0, -K % unit)), F.pad(W, (0, -K % unit))
    if N % unit:
        W = F.pad(W, (0, 0, 0, -N % unit))
    Y = _grouped_mm(X.contiguous(), W.mT, offsets)
    if N % unit:
        Y = Y[:, :N]
    if not has_unassigned_rows:
        return Y
    return Y.masked_fill_(unassigned_rows(offsets, X.shape[0]), 0.0)


def library_weight_gradient(dY: Tensor, X: Tensor, offsets: Tensor) -> Tensor:
    """Compute dW [E, N, K] with `grouped_mm`; zero for an expert without rows."""
    (S, N), K = dY.shape, X.shape[1]
    unit = 16 // X.element_size()
    dY, X = F.pad(dY, (0, -N % unit)), F.pad(X, (0, -K % unit))
    # The product sums over the rows of a group: rows of the transposed operand need padding too.
    dY, X = (F.pad(t, (0, 0, 0, -S % unit)) for t in (dY, X))
    dW = _grouped_mm(dY.mT, X, offsets)[:, :N, :K]
    if dW.device.type == "cuda":  # only the CPU's product is known to write zeros
        empty = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
        dW = dW.masked_fill(empty[:, None, None], 0.0)
    return dW


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Call the library's product.

    The library's shape rule knows bf16 only, although its product accepts other dtypes. Fake and
    meta tensors therefore go through an op with a shape rule of our own.
    """
    if torch.compiler.is_compiling() or a.is_meta or type(a).__name__ == "FakeTensor":
        y: Tensor = torch.ops.lightning_peft.grouped_mm(a, b, offsets)
        return y
    return F.grouped_mm(a, b, offs=offsets)


def _grouped_mm_default(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=offsets)


def _grouped_mm_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])


define_op(
    "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    fake=_grouped_mm_fake,
    default=_grouped_mm_default,
)


def _unaligned(X: Tensor, W: Tensor) -> bool:
    """Whether rows of the product's operands are not multiples of 16 bytes."""
    unit = 16 // X.element_size()
    return any(n % unit for n in W.shape[1:])
