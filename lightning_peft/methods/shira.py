"""SHiRA: few entries of a weight at random places. Bhardwaj et al. 2024, arXiv:2406.13175."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.sparse import Sparse
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import require, require_places
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.limits import at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["SHiRA"]


def _unpack(
    method: SHiRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors unchanged, after a check that places lie in the weight."""
    if "places" in p:
        rows, columns = p["places"].long()
        for places, size in ((rows, site.out_features), (columns, site.in_features)):
            require(
                int(places.min()) >= 0 and int(places.max()) < size,
                f"expected indices from 0 to {size - 1}, got {int(places.min())} to "
                f"{int(places.max())}",
            )
        require_places(rows * site.in_features + columns, site.shape.numel())
    return dict(p)


@register
@dataclass(frozen=True)
class SHiRA(WeightMethod):
    """ΔW[places] = values: r (in + out) entries, as many numbers as LoRA of rank r.

    Attributes:
        r: Sets the number of entries; r (in + out) ≤ in · out.
        seed: Seed of the trained places; layers of one shape share them. None uses the run's seed.

    Raises:
        ValueError: r < 1.
    """

    r: int = 32
    seed: int | None = None

    limits = {"r": at_least(1)}
    site_rules = (one_matrix,)
    hf = HFFormat(
        peft_type="SHIRA",
        tensors={"values": "shira_weight", "places": "shira_indices"},
        integers=("places",),
        config=config_keys("r", seed="random_seed"),
        own_defaults=True,
        fixed={"mask_type": "random"},
        inert={"fan_in_fan_out": False, "init_weights": True},
        unpack=_unpack,
        refuse=refuse_all_but_linear,
    )

    def check(self, site: Site) -> None:
        """Check that the weight has at least as many entries as there are places."""
        super().check(site)
        n, most = self._count(site), site.shape.numel()
        require(
            n <= most,
            f"{self.label} on {site.quoted}: expected r (in_features + out_features) <= "
            f"in_features · out_features = {most}, got {n} with r = {self.r}; lower r or exclude "
            "the layer",
        )

    def _count(self, site: Site) -> int:
        return self.r * (site.in_features + site.out_features)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """values [K] zeros."""
        return {"values": empty_like_site(site, self._count(site)).zero_()}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """places int32 [2, K]: rows and columns, in order."""
        n = self._count(site)
        if site.device.type == "meta":
            return {"places": torch.empty(2, n, dtype=torch.int32, device="meta")}
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        at = torch.randperm(site.shape.numel(), generator=generator)[:n].sort().values
        return {"places": torch.stack((at // site.in_features, at % site.in_features)).int()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A sparse change."""
        rows, columns = p["places"].long()
        places = rows * site.in_features + columns
        return Edit(terms=(Sparse(p["values"], places, (site.out_features, site.in_features)),))
