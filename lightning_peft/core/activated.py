"""Low-rank changes that act at some positions of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, NotMergeable, Term

__all__ = ["Activated"]


@dataclass(frozen=True)
class Activated(Term):
    """A low-rank change at some positions.

    Attributes:
        low_rank: The change.
        on: [batch, positions] bool; None where no batch was seen.
    """

    low_rank: LowRank
    on: Tensor | None

    def matrix(self) -> Tensor:
        """None: it depends on the position."""
        raise NotMergeable("it acts from its invocation tokens on, not on every input")

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products; the thin activations are zero where it does not act."""
        low, on = self.low_rank, self.on
        if on is None or on.numel() != x.shape[:-1].numel():
            got = "none" if on is None else list(on.shape)
            raise RuntimeError(
                f"{site.label}: expected a forward of the whole model on input_ids, which says "
                f"where aLoRA acts, got inputs {list(x.shape)} and positions {got}"
            )
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(low.A.dtype)
        h = torch.nn.functional.linear(x, low.A) * low.scaling
        h = h * on.reshape(*x.shape[:-1], 1).to(h.dtype)
        return torch.nn.functional.linear(h, low.B)
