"""Shared parts of methods that train few coefficients at random places of a spectrum."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.core.sparse import random_places
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import match_site, require, require_matrix

__all__ = ["SpectralMethod"]


class SpectralMethod(BiasOption):
    """Base of methods with n coefficients; the dataclass of a method declares the fields.

    Attributes:
        n_frequency: n ≤ in · out.
        seed: Seed of the places; layers of one shape share them.
        n_frequency_pattern: Layer name pattern → n_frequency.
    """

    n_frequency: int
    seed: int
    n_frequency_pattern: dict[str, int]

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for where, n in {"n_frequency": self.n_frequency, **self.n_frequency_pattern}.items():
            require(n >= 1, f"{self.label}: expected n_frequency >= 1, got {where} = {n}")

    def count(self, site: Site) -> int:
        """Number of coefficients at this site."""
        return match_site(self.n_frequency_pattern, site, self.n_frequency)

    def check(self, site: Site) -> None:
        """At most as many places as entries."""
        require_matrix(self.label, site)
        most = site.shape.numel()
        require(
            self.count(site) <= most,
            f"{self.label} on {site.quoted}: expected n_frequency <= in_features · out_features "
            f"= {most}, got {self.count(site)}; lower it or exclude the layer",
        )

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Places int32 [n], flat."""
        return {"places": random_places(site, self.count(site), self.seed)}
