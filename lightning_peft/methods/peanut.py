"""PEANuT: a small network of the weight, ΔW = s B g(A W). Zhong et al. 2024, arXiv:2410.01870."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import empty_like_site, kaiming, require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.registry import register

__all__ = ["PEANuT"]

_MOST = 32  # layers of each half that a file may have
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


def _pack(method: PEANuT, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One entry per layer of the network."""
    layers = {f"{k}{i}": p[k][i] for k in ("E", "D") if k in p for i in range(method.depth)}
    return {"A": p["A"], "B": p["B"], **layers}


def _unpack(
    method: PEANuT, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Layers stacked."""
    found = {k: t for k, t in p.items() if k in ("A", "B")}
    for half in ("E", "D") if method.depth else ():
        found[half] = torch.stack([p[f"{half}{i}"] for i in range(method.depth)])
    left = sorted(set(p) - set(_pack(method, site, found)))
    require(not left, f"expected {method.depth} layers of each half by the config, got {left} too")
    return found


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

    hf = HFFormat(
        peft_type="PEANUT",
        tensors={
            "A": "peanut_A.weight",
            "B": "peanut_B.weight",
            **{f"E{i}": f"peanut_encoders.{i}.weight" for i in range(_MOST)},
            **{f"D{i}": f"peanut_decoders.{i}.weight" for i in range(_MOST)},
        },
        config=config_keys("r", "depth", "act_fn", "scaling"),
        own_defaults=True,
        inert={"init_weights": True},
        pack=_pack,
        unpack=_unpack,
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self.r >= 1, f"{self.label}: expected r >= 1, got r = {self.r}")
        require(
            0 <= self.depth <= _MOST,
            f"{self.label}: expected 0 <= depth <= {_MOST}, got {self.depth}",
        )
        require(
            self.act_fn in _ACTIVATIONS,
            f"{self.label}: expected act_fn in {sorted(_ACTIVATIONS)}, got {self.act_fn!r}",
        )

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
