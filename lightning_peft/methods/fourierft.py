"""FourierFT: few Fourier coefficients of ΔW. Gao et al. 2024, arXiv:2405.03003."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import FormedTerm
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.registry import register
from lightning_peft.methods.spectral import SpectralMethod
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["Fourier", "FourierFT"]


@dataclass(frozen=True)
class Fourier(FormedTerm):
    """ΔW = scaling · Re ifft2(S) with S.flatten()[places] = c, S [out, in]."""

    c: Tensor
    places: Tensor
    shape: tuple[int, int]
    scaling: float

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        c = self.c.float() if self.c.dtype.itemsize < 4 else self.c
        S = c.new_zeros(self.shape[0] * self.shape[1]).index_add(0, self.places, c)
        delta = torch.fft.ifft2(S.view(self.shape)).real
        scaled: Tensor = (self.scaling * delta).to(self.c.dtype)
        return scaled

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Few rows: Re ifft_out(S ifft_in(x)), which forms no ΔW; else ΔW is cheaper."""
        out, width = self.shape
        if not ops.features_last or x.numel() >= width * width:
            return super().apply(ops, site, x)
        c, x = (t.float() if t.dtype.itemsize < 4 else t for t in (self.c, x))
        with torch.autocast(x.device.type, enabled=False):
            thin = torch.fft.ifft(x).index_select(-1, self.places % width) * c
            S = thin.new_zeros(*x.shape[:-1], out).index_add(-1, self.places // width, thin)
            y: Tensor = self.scaling * torch.fft.ifft(S).real
        return y


@register
@dataclass(frozen=True)
class FourierFT(SpectralMethod):
    """n trained coefficients at random frequencies, inverse transform for the change.

    Attributes:
        n_frequency: n ≤ in · out.
        scaling: Factor of the transform.
        seed: Seed of the frequencies; layers of one shape share them.
        n_frequency_pattern: Layer name pattern → n_frequency.
        zero_start: Coefficients start at zero, so that the output is unchanged; else normal, as in
            the paper.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"fourier_only"``.

    Raises:
        ValueError: n_frequency < 1.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    seed: int = 777
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    zero_start: bool = False
    bias: Literal["none", "all", "fourier_only"] = "none"

    hf = HFFormat(
        peft_type="FOURIERFT",
        tensors={"c": "fourierft_spectrum"},
        unwritten=("places",),
        config=config_keys(
            "bias", "n_frequency", "scaling", "n_frequency_pattern", seed="random_loc_seed"
        ),
        own_defaults=True,
        inert={"fan_in_fan_out": False, "init_weights": False},
        refuse=refuse_all_but_features,
    )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """c [n]."""
        c = empty_like_site(site, self.count(site))
        return {"c": c.zero_() if self.zero_start else torch.nn.init.normal_(c)}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A change by its spectrum."""
        shape = site.out_features, site.in_features
        return Edit(terms=(Fourier(p["c"], p["places"], shape, self.scaling),))
