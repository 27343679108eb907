"""WaveFT: few wavelet coefficients of ΔW. Bilican et al. 2025, arXiv:2505.12532."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.sparse import Sparse
from lightning_peft.core.terms import FormedTerm
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.checks import empty_like_site, require_choice
from lightning_peft.methods.daubechies import FAMILIES, synthesis, synthesis_filters
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.registry import register
from lightning_peft.methods.spectral import SpectralMethod

__all__ = ["WaveFT", "Wavelet"]


@dataclass(frozen=True)
class Wavelet(FormedTerm):
    """ΔW = scaling · R_out S R_inᵀ, R one level of a wavelet's synthesis, S.flatten()[places] = c.

    S has even sizes, larger than [out, in] by what the filters cut off; places lie at its centre.
    """

    c: Tensor
    places: Tensor
    shape: tuple[int, int]
    family: str
    scaling: float

    def _spectrum(self) -> Tensor:
        """S; peft gives the right upper quadrant to the filters of rows and the left lower one to
        those of columns: both change places.
        """
        cut = 2 * FAMILIES[self.family] - 2
        rows, columns = (n + cut + (n + cut) % 2 for n in self.shape)
        u = self.places // self.shape[1] + (rows - self.shape[0]) // 2
        v = self.places % self.shape[1] + (columns - self.shape[1]) // 2
        right, low = v >= columns // 2, u >= rows // 2
        turn = (right ^ low).int()  # one of the two off-diagonal quadrants
        u, v = (
            u + turn * torch.where(low, -1, 1) * (rows // 2),
            v + turn * torch.where(right, -1, 1) * (columns // 2),
        )
        c = self.c.float() if self.c.dtype.itemsize < 4 else self.c
        S = c.new_zeros(rows * columns).index_add(0, u * columns + v, self.scaling * c)
        return S.view(rows, columns)

    def matrix(self) -> Tensor:
        """ΔW: both axes of S by strided convolutions."""
        filters = synthesis_filters(self.family, self.c.device, torch.float32)
        S = self._spectrum()
        filters = filters.to(S.dtype)
        with torch.autocast(S.device.type, enabled=False):
            half = synthesis(S, filters, self.shape[0])
            delta = synthesis(half.mT, filters, self.shape[1]).mT
        return delta.to(self.c.dtype)


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """Numbers that are proportional to layers, as a pattern of full names."""
    if not config.get("proportional_parameters"):
        return {}
    return {"n_frequency_pattern": {e.site.name: len(e.tensors["c"]) for e in entries if e.tensors}}


@register
@dataclass(frozen=True)
class WaveFT(SpectralMethod):
    """n trained coefficients at random places of a wavelet's spectrum.

    Attributes:
        n_frequency: n ≤ in · out.
        scaling: Factor of the change.
        family: Daubechies' wavelet, ``"db1"`` … ``"db10"``.
        use_idwt: Whether the coefficients are a spectrum; False trains entries of ΔW itself.
        seed: Seed of the places; layers of one shape share them.
        n_frequency_pattern: Layer name pattern → n_frequency.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"waveft_only"``.

    Raises:
        ValueError: n_frequency < 1, an unknown family.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    family: str = "db1"
    use_idwt: bool = True
    seed: int = 777
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)

    bias: str = "none"

    bias_word = "waveft_only"
    hf = HFFormat(
        peft_type="WAVEFT",
        tensors={"c": "waveft_spectrum"},
        unwritten=("places",),
        config=config_keys(
            "bias",
            "n_frequency",
            "scaling",
            "use_idwt",
            "n_frequency_pattern",
            family="wavelet_family",
            seed="random_loc_seed",
        ),
        own_defaults=True,
        inert={"fan_in_fan_out": False, "init_weights": True},
        defaults={"proportional_parameters": False},
        from_config=_from_config,
        refuse=refuse_all_but_features,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require_choice(self.label, "family", self.family, FAMILIES)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """c [n] zeros."""
        return {"c": empty_like_site(site, self.count(site)).zero_()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A change by its wavelet coefficients, or by its entries."""
        shape, places = (site.out_features, site.in_features), p["places"]
        if not self.use_idwt:
            return Edit(terms=(Sparse(self.scaling * p["c"], places, shape),))
        return Edit(terms=(Wavelet(p["c"], places, shape, self.family, self.scaling),))
