"""Factors on adapters, per token and layer, that a router found for the batch at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, NotMergeable, Term, as_low_rank

__all__ = ["GatedExpert", "Gates"]


@dataclass(frozen=True)
class GatedExpert(Term):
    """A low-rank change times a factor per token, gate [batch, positions]."""

    low_rank: LowRank
    gate: Tensor

    def matrix(self) -> Tensor:
        """None: the factor depends on the input."""
        raise NotMergeable("its factor depends on the token")

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """The change, row by row times its factor."""
        y = self.low_rank.apply(ops, site, x)
        if self.gate.numel() != y.shape[:-1].numel():
            raise RuntimeError(
                f"{site.label}: expected one row per token of the router's text, "
                f"{list(self.gate.shape)}, got outputs {list(y.shape)}; leave the layer out of the "
                "adapters that are routed"
            )
        return y * self.gate.reshape(*y.shape[:-1], 1).to(y.dtype)


@dataclass(frozen=True)
class Gates:
    """Factors of the experts in every layer.

    Attributes:
        values: [batch, positions, layers or 1, experts].
        layers: Number of each layer, by the module's id.
        experts: Number of each adapter name.
    """

    values: Tensor
    layers: Mapping[int, int]
    experts: Mapping[str, int]

    def on(self, edit: Edit, adapter_name: str, site: Site) -> Edit:
        """Return an expert's edit with its factors; other adapters keep theirs."""
        number = self.experts.get(adapter_name)
        if number is None:
            return edit
        layer = self.layers[id(site.module)] if self.values.shape[-2] > 1 else 0
        gate = self.values[..., layer, number]
        thin = [as_low_rank(term) for term in edit.terms]
        return dataclasses.replace(
            edit, terms=tuple(GatedExpert(term, gate) for term in thin if term is not None)
        )
