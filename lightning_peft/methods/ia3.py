"""IA3: activations times a trained vector. Liu et al. 2022, arXiv:2205.05638."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.name_patterns import fullmatch
from lightning_peft.core.names import matches_suffix
from lightning_peft.core.site import Site
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.ia3 import FORMAT
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["IA3"]


@register
@dataclass(frozen=True)
class IA3(WeightMethod):
    """One vector a layer, 1 at the start: y = l ⊙ (x Wᵀ + b), or y = (l ⊙ x) Wᵀ + b.

    Attributes:
        mode: ``"multiply"``; or ``"add"``: y + d, a bias trained from zero, also where the layer
            has none.
        feedforward_modules: Suffixes of the layers whose input is scaled rather than the output;
            a single string may also be a pattern of complete names. None means the architecture's
            feed-forward layers.

    Raises:
        ValueError: an unknown mode.
    """

    mode: Literal["multiply", "add"] = "multiply"
    feedforward_modules: str | list[str] | None = None

    default_targets: ClassVar[str] = "ia3"

    hf = FORMAT

    def resolved(self, feedforward: Sequence[str]) -> Method:
        """The architecture's feed-forward layers, unless they are named."""
        if self.feedforward_modules is not None:
            return self
        return dataclasses.replace(self, feedforward_modules=list(feedforward))

    def scales_input(self, site: Site) -> bool:
        """Whether this layer is a feed-forward one."""
        rule = self.feedforward_modules or []
        if isinstance(rule, str):
            return matches_suffix(site.name, [rule]) or fullmatch(rule, site.name)
        return matches_suffix(site.name, rule)

    def check(self, site: Site) -> None:
        """The input of an embedding is ids: nothing to scale."""
        require(
            not (site.is_embedding and self.mode == "multiply" and self.scales_input(site)),
            f"{self.label} on {site.quoted}: expected a layer with features for input among "
            "feedforward_modules, got an embedding; take it off that list",
        )
        require(
            not (self.mode == "add" and site.is_embedding),
            f"{self.label} on {site.quoted}: expected a layer that adds a bias for mode='add', "
            "got an embedding; exclude it",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """Ones [out] or [channels]; zeros [out] in mode ``"add"``."""
        if self.mode == "add":
            return {"shift": empty_like_site(site, site.out_features).zero_()}
        n = site.channels if self.scales_input(site) else site.out_features
        return {"scale": torch.nn.init.ones_(empty_like_site(site, n))}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The scaled side; the bias is scaled with the output."""
        if self.mode == "add":
            return Edit(bias=p["shift"])
        if self.scales_input(site):
            return Edit(in_scale=p["scale"])
        return Edit(out_scale=p["scale"], scale_bias=True)
