"""Shared parts of methods that train few coefficients at random places of a spectrum."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.core.sparse import random_places
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import match_site, require
from lightning_peft.methods.limits import FACTOR, at_least
from lightning_peft.methods.site_rules import one_matrix

__all__ = ["SpectralMethod"]


class SpectralMethod(BiasOption):
    """Base of methods with n coefficients; the dataclass of a method declares the fields.

    Attributes:
        n_frequency: n ≤ in · out.
        seed: Seed of the places; layers of one shape share them.
        n_frequency_pattern: Layer name pattern → n_frequency.
        scaling: Factor on the change.
    """

    n_frequency: int
    seed: int
    n_frequency_pattern: dict[str, int]
    scaling: float

    limits = {
        "n_frequency": at_least(1),
        "n_frequency_pattern": at_least(1),
        "scaling": FACTOR,
    }
    site_rules = (one_matrix,)

    def count(self, site: Site) -> int:
        """Number of coefficients at this site."""
        return match_site(self.n_frequency_pattern, site, self.n_frequency)

    def check(self, site: Site) -> None:
        """At most as many places as entries."""
        super().check(site)
        most = site.shape.numel()
        require(
            self.count(site) <= most,
            f"{self.label} on {site.quoted}: expected n_frequency <= in_features · out_features "
            f"= {most}, got {self.count(site)}; lower it or exclude the layer",
        )

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Places int32 [n], flat."""
        return {"places": random_places(site, self.count(site), self.seed)}
