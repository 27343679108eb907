"""Lily: low-rank changes whose factors are shared by layers and mixed by a router. Zhong et al.
2024, arXiv:2407.09946.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.mixtures import Mixture
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry, HFFormat, WeightMethod
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.limits import above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import linear_layer, one_matrix
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["Lily"]


def _groups(sites: Sequence[Site]) -> list[list[int]]:
    """Numbers of the sites whose layers have one last name and one shape."""
    found: dict[tuple[str, torch.Size], list[int]] = {}
    for i, site in enumerate(sites):
        found.setdefault((site.name.rpartition(".")[2], site.shape), []).append(i)
    return list(found.values())


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    """Check that layers that share a factor have equal copies of it."""
    method = Lily(r=config["r"], stride=config["stride_A"], n=config["num_B"])
    complete = [e for e in entries if {"A", "B"} <= set(e.tensors)]
    for e, owners in zip(complete, method.owners([e.site for e in complete]), strict=True):
        for name, i in owners.items():
            if not torch.equal(complete[i].tensors[name], e.tensors[name]):
                raise ValueError(
                    f"{e.path!r}: expected the {Lily.hf.tensors[name]} of {complete[i].path!r}, "
                    f"which Lily shares under stride_A={method.stride}, got another; peft shared "
                    "them in other groups than layers of one last name and shape"
                )
    return {}


@register
@dataclass(frozen=True)
class Lily(WeightMethod):
    """W + s Σ_e w_e B_eᵀ A; the weights w follow from the input. It has no merged form.

    A is shared by `stride` neighbouring layers of one name and shape, the B_e by all of them. As in
    peft, w is one mean over all tokens of the batch: the output of a row depends on the rows
    next to it, and on padding. With `per_sample` it depends on the row alone.

    Attributes:
        r: Rank.
        stride: Number of neighbouring layers that share A.
        n: Number of the B_e.
        scaling: s.
        per_sample: Whether every row of the batch has weights of its own. Not in peft.

    Raises:
        ValueError: r, stride or n below 1, a scaling that is not above 0.
    """

    r: int = 32
    stride: int = 1
    n: int = 2
    scaling: float = 1.0
    per_sample: bool = False

    mergeable: ClassVar[bool] = False

    limits = {"r": at_least(1), "stride": at_least(1), "n": at_least(1), "scaling": above(0)}
    site_rules = (one_matrix, linear_layer)
    hf = HFFormat(
        peft_type="LILY",
        tensors={"A": "lily_A.weight", "B": "lily_B.weight", "R": "lily_router.weight"},
        config=config_keys("r", "scaling", stride="stride_A", n="num_B"),
        own_defaults=True,
        inert={"init_weights": True},
        from_config=_from_config,
        shares_by_target=True,
        refuse=lambda method, site: (
            "peft has one mixture for the whole batch, not one per row (per_sample)"
            if method.per_sample
            else refuse_all_but_linear(method, site)
        ),
    )

    def owners(self, sites: Sequence[Site]) -> Sequence[Mapping[str, int]]:
        """The first layer of a group owns B, the first of each `stride` layers A."""
        found: list[dict[str, int]] = [{} for _ in sites]
        for group in _groups(sites):
            for place, i in enumerate(group):
                first = group[place - place % self.stride]
                found[i] |= {"A": first} if first != i else {}
                found[i] |= {"B": group[0]} if group[0] != i else {}
        return found

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [r, in] and R [n, r] Kaiming-uniform, B [n · r, out] zero."""
        return {
            "A": kaiming(empty_like_site(site, self.r, site.in_features)),
            "B": empty_like_site(site, self.n * self.r, site.out_features).zero_(),
            "R": kaiming(empty_like_site(site, self.n, self.r)),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The mixture."""
        return Edit(terms=(Mixture(p["A"], p["B"], p["R"], self.scaling, self.per_sample),))
