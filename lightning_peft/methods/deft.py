"""DEFT: a subspace of the output projected away and trained instead, W' = W − Q Nᵀ W + s Q R; PaRa
without the second part. peft 0.21, `tuners/deft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.limits import above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["DEFT"]


@register
@dataclass(frozen=True)
class DEFT(BiasOption):
    """ΔW = Q (s R − Nᵀ W) of rank r. Q = P, N = relu(P), or both the Q factor of P's QR.

    R starts as Nᵀ W / s: the output is unchanged, up to rounding. With `para` it is not.

    Attributes:
        r: Directions of the output; at most out_features, where it stops.
        decomposition: ``"relu"`` (not orthogonal) or ``"qr"``.
        alpha: Scale numerator, s = alpha / r; None for s = 1.
        para: If True, project away only, without R (PaRa).
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"deft_only"``.

    Raises:
        ValueError: r < 1, alpha not above 0, an unknown decomposition.
    """

    r: int = 8
    decomposition: Literal["relu", "qr"] = "relu"
    alpha: float | None = None
    para: bool = False
    bias: Literal["none", "all", "deft_only"] = "none"

    limits = {"r": at_least(1), "alpha": above(0)}
    site_rules = (one_matrix,)
    hf = HFFormat(
        peft_type="DEFT",
        tensors={"P": "deft_P", "R": "deft_R"},
        config=config_keys("bias", "r", "alpha", "para", decomposition="decomposition_method"),
        own_defaults=True,
        fixed={"deft_dropout": 0.0},
        inert={"fan_in_fan_out": False, "init_weights": True},
        ignored=("init_scale",),
        refuse=refuse_all_but_features,
    )

    def rank(self, site: Site) -> int:
        """Directions at a site."""
        return min(self.r, site.out_features)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """P [out, r] normal; R [r, in], filled from the weight."""
        r = self.rank(site)
        p = {"P": torch.nn.init.normal_(empty_like_site(site, site.out_features, r), std=0.02)}
        if not self.para:
            p["R"] = empty_like_site(site, r, site.in_features).zero_()
        return p

    @property
    def starts_from_weight(self) -> bool:
        """R gives back what P takes away."""
        return not self.para

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """R = Nᵀ W / s."""
        N = self._directions(p["P"])[1]
        p["R"] = N.mT.to(W) @ W / self._scale(site)
        return None

    def _scale(self, site: Site) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank(site)

    def _directions(self, P: Tensor) -> tuple[Tensor, Tensor]:
        if self.decomposition == "relu":
            return P, P.relu()
        Q = torch.linalg.qr(P.float() if P.dtype.itemsize < 4 else P)[0].to(P.dtype)
        return Q, Q

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """Low rank, after one thin product with the weight."""
        Q, N = self._directions(p["P"])
        A = -(N.mT @ site.weight(N.dtype))
        if not self.para:
            A = A + self._scale(site) * p["R"]
        return Edit(terms=(LowRank(A, Q),))
