"""UniLoRA: all low-rank factors of a model drawn from one trained vector. Li et al. 2025,
arXiv:2506.00799.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.formats.unilora import FORMAT
from lightning_peft.methods.limits import FRACTION, above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_shared, require_size

__all__ = ["UniLoRA"]


@register
@dataclass(frozen=True)
class UniLoRA(BiasOption):
    """ΔW = B A, every entry of A [r, in] and B [out, r] one of θ over the root of its count.

    The output changes a little at the start, as in peft.

    Attributes:
        r: Rank.
        length: Length of θ, which all layers share.
        seed: Seed of the places, which run over all layers in the order of the model.
        dropout: Probability of dropping an input element of the branch, in training.
        bound: θ starts uniform within ± this.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"unilora_only"``.

    Raises:
        ValueError: r or length below 1, dropout outside [0, 1).
    """

    r: int = 4
    length: int = 256
    seed: int = 42
    dropout: float = 0.0
    bound: float = 0.02
    bias: Literal["none", "all", "unilora_only"] = "none"

    limits = {
        "r": at_least(1),
        "length": at_least(1),
        "bound": above(0, ", since from zero θ is never trained"),
        "dropout": FRACTION,
    }
    site_rules = (one_matrix,)
    hf = FORMAT

    def _places(self, sites: Sequence[Site]) -> Tensor:
        """An index into θ for every entry of all factors; counts differ by one at most."""
        import numpy as np  # its generator's stream is part of the format

        n = sum(self.r * (s.in_features + s.out_features) for s in sites)
        require_size(sites, max(n, self.length))
        rng = np.random.default_rng(self.seed)
        places = np.repeat(np.arange(self.length), n // self.length)
        if rest := n % self.length:
            places = np.concatenate([places, rng.choice(self.length, size=rest, replace=False)])
        rng.shuffle(places)
        return torch.as_tensor(places, dtype=torch.int32)

    def shared_buffers(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """scale [length]: 1 over the root of each count."""
        counts = torch.bincount(self._places(sites), minlength=self.length)
        scale = torch.where(counts > 0, counts.clamp(min=1).float().rsqrt(), 0.0)
        return {"scale": scale.to(sites[0].device) if sites[0].device.type == "meta" else scale}

    def shared_parameters(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """theta [length]."""
        return {
            "theta": nn.init.uniform_(empty_shared(sites, self.length), -self.bound, self.bound)
        }

    def site_buffers(self, sites: Sequence[Site]) -> Sequence[Mapping[str, Tensor]]:
        """Indices at_A [r, in], at_B [out, r] int32, handed out layer by layer."""
        sizes = [(s.in_features * self.r, s.out_features * self.r) for s in sites]
        chunks = iter(self._places(sites).split([n for pair in sizes for n in pair]))
        return [
            {
                "at_A": next(chunks).view(self.r, -1).clone(),
                "at_B": next(chunks).view(-1, self.r).clone(),
            }
            for _ in sites
        ]

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """None of its own."""
        return {}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change: two gathers from θ."""
        theta = p["theta"] * p["scale"]
        A, B = (theta.index_select(0, p[k].reshape(-1)).view(p[k].shape) for k in ("at_A", "at_B"))
        return Edit(terms=(LowRank(A, B),), dropout=self.dropout)
