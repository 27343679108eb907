"""IA3: activations times a trained vector. Liu et al. 2022, arXiv:2205.05638."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.name_patterns import fullmatch
from lightning_peft.core.names import matches_suffix
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat, Method, WeightMethod
from lightning_peft.methods.checks import empty_like_site, require, require_choice, require_shape
from lightning_peft.methods.registry import register

__all__ = ["IA3"]


_ADDS = "peft's IA3 multiplies only; its BEFT adds: attach BEFT()"


def _pack(method: IA3, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[1, in] where the input is scaled, [out, 1] where the output is."""
    return {"scale": p["scale"].unsqueeze(0 if method.scales_input(site) else 1)}


def _unpack(
    method: IA3, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    scale = p.get("scale")
    if scale is not None and scale.ndim == 2:  # a convolution's is flat already
        inside = method.scales_input(site)
        size = site.in_features if inside else site.out_features
        require_shape("ia3_l", scale, (1, size) if inside else (size, 1))
    return {k: t.reshape(-1) for k, t in p.items()}


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    """Feed-forward layers as a pattern of full names: peft asks lists of them to be a subset of
    `target_modules`.
    """
    names = [re.escape(e.path) for e in entries if e.method.scales_input(e.site)]
    config["feedforward_modules"] = "|".join(names) if names else []


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """Full names of the layers that the config's rule (plain endings, or a pattern) means."""
    rule = config.get("feedforward_modules") or []
    if isinstance(rule, str):
        names = [e.site.name for e in entries if fullmatch(rule, e.path)]
    else:
        names = [e.site.name for e in entries if e.path.endswith(tuple(rule))]
    return {"feedforward_modules": names}


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

    hf = HFFormat(
        peft_type="IA3",
        tensors={"scale": "ia3_l"},
        axes={"scale": "vector"},
        config={},
        defaults={"feedforward_modules": None},
        inert={"fan_in_fan_out": False, "init_ia3_weights": True},
        pack=_pack,
        unpack=_unpack,
        to_config=_to_config,
        from_config=_from_config,
        kinds=("Linear", "Conv1D", "Conv2d", "Conv3d"),
        follows=("dilation", "padding_mode"),
        refuse=lambda method, site: _ADDS if method.mode == "add" else "",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_choice(self.label, "mode", self.mode, ("multiply", "add"))

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
