"""GLoRA: the weight scaled and shifted, and the bias with it. Chavan et al. 2023,
arXiv:2306.07967.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import empty_like_site, kaiming, require, require_matrix
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.registry import register

__all__ = ["GLoRA"]

_PATHS = "ABCDE"


def _shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """The shape of each path's value."""
    out, inner = site.out_features, site.in_features
    return {"A": (out, inner), "B": (out, inner), "C": (inner, 1), "D": (out,), "E": (out,)}


def _pack(method: GLoRA, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With zeros for the paths that a site has not, as peft writes them."""
    present = {name[0] for name in p}
    some = next(iter(p.values()))
    shapes = _shapes(site).items()
    return {**p, **{f"{k}0": some.new_zeros(s) for k, s in shapes if k not in present}}


def _unpack(
    method: GLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Without those zeros."""
    return {name: t for name, t in p.items() if not name.endswith("0")}


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

    hf = HFFormat(
        peft_type="GLORA",
        tensors={
            **{f"{k}{d}": f"glora_{k}.X{d}" for k in "ABC" for d in "du"},
            **{k: f"glora_{k}.X" for k in _PATHS},
            **{f"{k}0": f"glora_{k}.zeros" for k in _PATHS},
        },
        config=config_keys(
            "r", weight_form="config_A_B", weight_to_bias="config_C", bias_form="config_D_E"
        ),
        own_defaults=True,
        fixed={"bias": "none"},
        inert={"init_weights": True},
        pack=_pack,
        unpack=_unpack,
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self.r >= 1, f"{self.label}: expected r >= 1, got r = {self.r}")
        forms = ("lora", "vector", "constant"), ("lora", "vector", "none")
        known = dict(zip(("weight_form", "weight_to_bias"), forms, strict=True))
        for name, form in {**known, "bias_form": ("vector", "constant", "none")}.items():
            got = getattr(self, name)
            require(got in form, f"{self.label}: expected {name} in {form}, got {got!r}")

    def check(self, site: Site) -> None:
        """One matrix."""
        require_matrix(self.label, site)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Xu random, all others zeros."""
        forms: dict[str, str] = {"A": self.weight_form, "B": self.weight_form}
        if site.has_bias:
            forms |= {"C": self.weight_to_bias, "D": self.bias_form, "E": self.bias_form}
        p: dict[str, Tensor] = {}
        for k, form in forms.items():
            shape = _shapes(site)[k]
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
