"""Terms that mix low-rank changes with weights that depend on the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.input_dtype import to_adapter_dtype
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import NotMergeable, Term

__all__ = ["Mixture", "Routed", "only_largest"]


def only_largest(g: Tensor, k: int, rest: float) -> Tensor:
    """Return g [..., n] with `rest` in place of all but the k largest of each row."""
    top = g.topk(min(k, g.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(g, dtype=torch.bool).scatter(-1, top, True)
    return g.masked_fill(~chosen, rest)


@dataclass(frozen=True)
class Routed(Term):
    """Σ_e w_e B_e A_e x; w is the softmax of |x · v_e| / temperature over the largest `top_k`.

    Attributes:
        A: [R, in], the factors of all experts one behind the other.
        B: [out, R], scales included.
        v: [experts, in], the leading right singular vector of each B_e A_e.
        owner: [R], the expert of each rank.
        top_k: Experts per token.
        temperature: See above.
    """

    A: Tensor
    B: Tensor
    v: Tensor
    owner: Tensor
    top_k: int
    temperature: float

    def matrix(self) -> Tensor:
        """None: the weights depend on the input."""
        raise NotMergeable("which experts act depends on the input")

    def weights(self, x: Tensor) -> Tensor:
        """Weights of the experts [..., experts]; zero but for `top_k`."""
        fit = torch.nn.functional.linear(x, self.v.to(x.dtype)).abs() / self.temperature
        return only_largest(fit, self.top_k, -torch.inf).softmax(-1)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products; the weights act on what lies between them."""
        x = to_adapter_dtype(x, self.A)
        h = torch.nn.functional.linear(x, self.A)
        h = h * self.weights(x).to(h.dtype)[..., self.owner]
        return torch.nn.functional.linear(h, self.B)


@dataclass(frozen=True)
class Mixture(Term):
    """s · h Σ_e w_e B_e with h = x Aᵀ and w the mean over tokens of softmax(h Rᵀ).

    Attributes:
        A: [r, in].
        B: [n · r, out].
        R: [n, r], the router.
        scaling: s.
        per_sample: Whether each row of the batch has its own mean; else the batch has one.
    """

    A: Tensor
    B: Tensor
    R: Tensor
    scaling: float
    per_sample: bool

    def matrix(self) -> Tensor:
        """None: the mixture depends on the input."""
        raise NotMergeable("its mixture of factors depends on the input")

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products, the second with mixed factors."""
        h = torch.nn.functional.linear(to_adapter_dtype(x, self.A), self.A)
        w = torch.nn.functional.linear(h, self.R.to(h.dtype)).softmax(-1)
        # s goes onto the few weights of the mixture, not onto the output.
        B = self.B.to(h.dtype).unflatten(0, (len(self.R), -1))
        if self.per_sample and x.dim() > 1:
            w = w.flatten(1, -2).mean(1) if w.dim() > 2 else w
            mixed = torch.einsum("be,eio->bio", w * self.scaling, B)
            return torch.einsum("b...i,bio->b...o", h, mixed)
        w = w.flatten(0, -2).mean(0) * self.scaling
        return h @ torch.einsum("e,eio->io", w, B)
