"""PEANuT: a small network of the weight, ΔW = s B g(A W). Zhong et al. 2024, arXiv:2410.01870."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import WeightMethod
from lightning_peft.methods.formats.peanut import FORMAT, MOST_LAYERS
from lightning_peft.methods.limits import FACTOR, at_least, between, one_of
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["PEANuT"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
}


@register
@dataclass(frozen=True)
class PEANuT(WeightMethod):
    """ΔW = s B h with h = g(A W) [r, in]; `depth` encoders and as many decoders, with skips.

    The weight is read once per step; on a packed base that is one dequantisation.

    Attributes:
        r: Width of the network.
        depth: Encoders, and decoders.
        act_fn: Activation g: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``, ``"sigmoid"``,
            ``"leaky_relu"``, ``"mish"``.
        scaling: s.

    Raises:
        ValueError: r < 1, depth outside 0 … 32, an unknown activation.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0

    limits = {
        "scaling": FACTOR,
        "depth": between(0, MOST_LAYERS),
        "r": at_least(1),
        "act_fn": one_of(_ACTIVATIONS),
    }
    hf = FORMAT

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [r, out], encoders and decoders [depth, r, r] random, B [out, r] zeros."""
        p = {
            "A": kaiming(empty_like_site(site, self.r, site.out_features)),
            "B": empty_like_site(site, site.out_features, self.r).zero_(),
        }
        for half in ("E", "D") if self.depth else ():
            p[half] = kaiming(empty_like_site(site, self.depth, self.r, self.r))
        return p

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """Low rank: A is the network's output for the weight."""
        g = _ACTIVATIONS[self.act_fn]
        h = g(p["A"] @ site.weight(p["A"].dtype))
        skips = []
        for i in range(self.depth):
            skips.append(h)
            h = g(p["E"][..., i, :, :] @ h)
        for i in range(self.depth):
            h = g(p["D"][..., i, :, :] @ h) + skips[-1 - i]
        return Edit(terms=(LowRank(h, p["B"], self.scaling),))
