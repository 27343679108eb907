"""Edit: the normal form of every weight method.

W' = M · diag(out_scale) · (W + Σ terms) · Rᵀ · diag(in_scale);   b' = M · (b + Δb) [· out_scale
if scale_bias]; then some rows of W' are replaced

acting on x as   y = M (out_scale ∘ ((x ∘ in_scale) R (W + Σ terms)ᵀ)) + b', M the output map.

A method lowers to an Edit; a layer applies it; a storage holds the W it is applied to. Composition
is an onion: W_k = edit_k(W_{k−1}), so that forward, merge and rows under different adapters agree
by construction. W is canonical, [*batch, out, in]; batch is the expert axis and usually absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_peft.core.replaced_rows import ReplacedRows
from lightning_peft.core.rotation import Rotation
from lightning_peft.core.terms import LowRank, Term, as_low_rank

if TYPE_CHECKING:
    from lightning_peft.core.protocols import LayerOps
    from lightning_peft.core.site import Site

__all__ = ["Edit", "OutMap", "apply_edits", "low_rank_terms"]


class OutMap(Protocol):
    """A linear map M of the output and its bias; on the weight it acts column by column."""

    def apply(self, y: Tensor) -> Tensor:
        """Return M y over the last axis."""
        ...


@dataclass(frozen=True)
class Edit:
    """A change of one weight in normal form; every part is optional.

    Attributes:
        terms: Additive changes of W.
        in_scale: [channels], multiplies the input.
        out_scale: [out], multiplies the output.
        rotation: Rotates the input.
        out_map: Maps the output, after everything else but `replaced`.
        replaced: Rows that act in place of the weight's, whatever the other parts did to them.
        bias: Δb [out], added to the bias.
        scale_bias: Whether `out_scale` multiplies the bias too (IA3 does, DoRA does not).
        dropout: Probability of dropping an element of the input of `terms`, in training.
    """

    terms: tuple[Term, ...] = ()
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    rotation: Rotation | None = None
    out_map: OutMap | None = None
    replaced: ReplacedRows | None = None
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
        return W if self.replaced is None else self.replaced.matrix(W)

    def edited_bias(self, b: Tensor | None) -> Tensor | None:
        """b' [out]; None where there is neither a bias nor a change of it."""
        if self.bias is not None:
            b = self.bias if b is None else b + self.bias
        if b is not None and self.scale_bias and self.out_scale is not None:
            b = b * self.out_scale
        if b is not None and self.out_map is not None:
            b = self.out_map.apply(b)
        return b

    @property
    def changes_bias(self) -> bool:
        """Whether `edited_bias` differs from a bias that the layer has."""
        scaled = self.scale_bias and self.out_scale is not None
        return self.bias is not None or scaled or self.out_map is not None

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
    def _only_terms(self) -> bool:  # written out for speed: every forward of every layer reads it
        return (
            self.in_scale is None
            and self.out_scale is None
            and self.rotation is None
            and self.out_map is None
            and self.replaced is None
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
        mapped = any(p is not None for p in (self.rotation, self.out_map, self.replaced))
        return not mapped and all(hasattr(t, "add_grouped") for t in self.terms)

    @property
    def _all_low_rank(self) -> bool:
        if len(self.terms) == 1 and type(self.terms[0]) is LowRank:  # the usual case
            return True
        return all(isinstance(t, LowRank) or hasattr(t, "to_low_rank") for t in self.terms)


_PARTS = ("in_scale", "out_scale", "rotation", "out_map", "replaced", "bias")


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
