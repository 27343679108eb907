"""MiSS: one small matrix shared by all stretches of the input. Kang & Yin 2024, arXiv:2409.15371
(its old name is Bone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense
from lightning_peft.core.tiled import Tiled
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.miss import FORMAT
from lightning_peft.methods.limits import FRACTION, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["MiSS"]


@register
@dataclass(frozen=True)
class MiSS(BiasOption):
    """y += (Σ_j x_j) D with D [r, out], x_j the stretches of length r of the input; no scale.

    Attributes:
        r: Length of a stretch, r ≤ in.
        mini_r: Columns of D before they are repeated, for form ``"mini"``; divides out.
        dropout: Probability of dropping an input element of the branch, in training.
        form: ``"default"``; ``"mini"``: D [r, mini_r] repeated along out; ``"bat"``: each block
            W_oi becomes W_oi + W_oi D_o + D_o (r divides in and out; the weight is formed).
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"MiSS_only"``.

    Raises:
        ValueError: r < 1, mini_r < 1, dropout outside [0, 1), an unknown form.
    """

    r: int = 64
    mini_r: int = 1
    dropout: float = 0.0
    form: Literal["default", "mini", "bat"] = "default"
    bias: Literal["none", "all", "MiSS_only"] = "none"

    limits = {"r": at_least(1), "mini_r": at_least(1), "dropout": FRACTION}
    hf = FORMAT

    def check(self, site: Site) -> None:
        """Lengths against the layer's size."""
        where = f"{self.label} on {site.quoted}"
        require(
            self.r <= site.in_features,
            f"{where}: expected r <= in_features = {site.in_features}, got r = {self.r}",
        )
        require(
            self.form != "mini" or site.out_features % self.mini_r == 0,
            f"{where}: expected mini_r that divides out_features = {site.out_features}, got "
            f"{self.mini_r}",
        )
        require(
            self.form != "bat"
            or (site.in_features % self.r == 0 and site.out_features % self.r == 0),
            f"{where}: expected r that divides in_features = {site.in_features} and out_features "
            f"= {site.out_features} for form='bat', got r = {self.r}",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """D zeros: [r, out], [r, mini_r] or [out/r, r, r]."""
        if self.form == "bat":
            shape: tuple[int, ...] = (site.out_features // self.r, self.r, self.r)
        else:
            shape = (self.r, self.mini_r if self.form == "mini" else site.out_features)
        return {"D": empty_like_site(site, *shape).zero_()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A tiled change; for ``"bat"`` one that is formed from the weight."""
        D = p["D"]
        if self.form == "bat":
            W = site.weight(D.dtype)
            r, lead = self.r, W.shape[:-2]
            blocks = W.reshape(*lead, -1, r, W.shape[-1] // r, r)  # [out/r, r, in/r, r]
            delta = torch.einsum("...oaib,...obc->...oaic", blocks, D) + D.unsqueeze(-2)
            return Edit(terms=(Dense(delta.reshape(W.shape)),), dropout=self.dropout)
        if self.form == "mini":
            D = D.repeat(*(1,) * (D.ndim - 1), site.out_features // self.mini_r)
        return Edit(terms=(Tiled(D, site),), dropout=self.dropout)
