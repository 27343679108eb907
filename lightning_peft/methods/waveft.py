"""WaveFT: few wavelet coefficients of ΔW. Bilican et al. 2025, arXiv:2505.12532."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.sparse import Sparse
from lightning_peft.core.wavelets import FAMILIES, Wavelet
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.limits import one_of
from lightning_peft.methods.registry import register
from lightning_peft.methods.spectral import SpectralMethod
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["WaveFT"]


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
    bias: Literal["none", "all", "waveft_only"] = "none"

    limits = {"family": one_of(FAMILIES)}
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

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """c [n] zeros."""
        return {"c": empty_like_site(site, self.count(site)).zero_()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A change by its wavelet coefficients, or by its entries."""
        shape, places = (site.out_features, site.in_features), p["places"]
        if not self.use_idwt:
            return Edit(terms=(Sparse(self.scaling * p["c"], places, shape),))
        return Edit(terms=(Wavelet(p["c"], places, shape, self.family, self.scaling),))
