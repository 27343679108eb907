"""GLoRA: the weight scaled and shifted, and the bias with it. Chavan et al. 2023,
arXiv:2306.07967.
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
from lightning_peft.methods.base import WeightMethod
from lightning_peft.methods.formats.glora import FORMAT, path_shapes
from lightning_peft.methods.limits import at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["GLoRA"]


@register
@dataclass(frozen=True)
class GLoRA(WeightMethod):
    """W' = W + W ∘ A + B; b' = b + b ∘ D + E + W C. C, D and E act where the layer has a bias.

    Attributes:
        r: Rank of a path that is ``"lora"``.
        weight_form: Form of A and B: ``"lora"``, ``"vector"`` (per output), ``"constant"``.
        weight_to_bias: Form of C: ``"lora"``, ``"vector"`` (per input), ``"none"``.
        bias_form: Form of D and E: ``"vector"``, ``"constant"``, ``"none"``.

    Raises:
        ValueError: r < 1, an unknown form.
    """

    r: int = 8
    weight_form: Literal["lora", "vector", "constant"] = "lora"
    weight_to_bias: Literal["lora", "vector", "none"] = "lora"
    bias_form: Literal["vector", "constant", "none"] = "constant"

    limits = {"r": at_least(1)}
    site_rules = (one_matrix,)
    hf = FORMAT

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Xu random, all others zeros."""
        forms: dict[str, str] = {"A": self.weight_form, "B": self.weight_form}
        if site.has_bias:
            forms |= {"C": self.weight_to_bias, "D": self.bias_form, "E": self.bias_form}
        p: dict[str, Tensor] = {}
        for k, form in forms.items():
            shape = path_shapes(site)[k]
            if form == "lora":
                p[f"{k}d"] = empty_like_site(site, shape[0], self.r).zero_()
                p[f"{k}u"] = kaiming(empty_like_site(site, self.r, shape[1]))
            elif form != "none":
                vector = shape if k in "CDE" else (shape[0], 1)
                p[k] = empty_like_site(site, *(vector if form == "vector" else (1,))).zero_()
        return p

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A dense change, and one of the bias."""
        W = site.weight(next(iter(p.values())).dtype)
        if self.weight_form == "lora":
            delta = torch.addcmul(p["Bd"] @ p["Bu"], W, p["Ad"] @ p["Au"])
        else:
            delta = torch.addcmul(p["B"], W, p["A"])
        return Edit(terms=(Dense(delta),), bias=self._bias(p, site, W))

    def _bias(self, p: Mapping[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        b = site.bias(W.dtype)
        # Another adapter's merge may add a bias that was not there when this one was built.
        if b is None or not p.keys() & {"C", "Cd", "D", "E"}:
            return None
        change = b * p["D"] + p["E"] if "D" in p else torch.zeros_like(b)
        if self.weight_to_bias != "none":
            C = p["C"] if "C" in p else p["Cd"] @ p["Cu"]
            change = change + (W @ C).squeeze(-1)
        return change
