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
from lightning_peft.core.input_dtype import to_adapter_dtype
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import NotMergeable, Term
from lightning_peft.methods.base import HFEntry, HFFormat, WeightMethod
from lightning_peft.methods.checks import empty_like_site, kaiming, require, require_matrix
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.registry import register

__all__ = ["Lily", "Mixture"]


@dataclass(frozen=True)
class Mixture(Term):
    """s · h Σ_e w_e B_e with h = x Aᵀ and w the mean over tokens of softmax(h Rᵀ).

    Attributes:
        A: [r, in].
        B: [n · r, out].
        R: [n, r], the router.
        scaling: s.
        per_sample: Whether each row of the batch has its own mean; else the batch has one.
    """

    A: Tensor
    B: Tensor
    R: Tensor
    scaling: float
    per_sample: bool

    def matrix(self) -> Tensor:
        """None: the mixture depends on the input."""
        raise NotMergeable("its mixture of factors depends on the input")

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products, the second with mixed factors."""
        h = torch.nn.functional.linear(to_adapter_dtype(x, self.A), self.A)
        w = torch.nn.functional.linear(h, self.R.to(h.dtype)).softmax(-1)
        B = self.B.to(h.dtype).unflatten(0, (len(self.R), -1))
        if self.per_sample and x.dim() > 1:
            w = w.flatten(1, -2).mean(1) if w.dim() > 2 else w
            mixed = torch.einsum("be,eio->bio", w, B)
            return torch.einsum("b...i,bio->b...o", h, mixed) * self.scaling
        return h @ torch.einsum("e,eio->io", w.flatten(0, -2).mean(0), B) * self.scaling


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

    hf = HFFormat(
        peft_type="LILY",
        tensors={"A": "lily_A.weight", "B": "lily_B.weight", "R": "lily_router.weight"},
        config={"r": "r", "stride": "stride_A", "n": "num_B", "scaling": "scaling"},
        fixed={"init_weights": True},
        defaults={"stride_A": 1, "num_B": 2, "scaling": 1.0},
        ignored=("init_weights",),
        from_config=_from_config,
        shares_by_target=True,
        refuse=lambda method, site: (
            "peft has one mixture for the whole batch, not one per row (per_sample)"
            if method.per_sample
            else refuse_all_but_linear(method, site)
        ),
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(
            min(self.r, self.stride, self.n) >= 1 and self.scaling > 0,
            f"{self.label}: expected r, stride and n >= 1 and scaling > 0, got {self.r}, "
            f"{self.stride}, {self.n}, {self.scaling}",
        )

    def check(self, site: Site) -> None:
        """A layer whose input ends in features."""
        require_matrix(self.label, site)
        require(
            site.ops.features_last and not site.is_embedding,
            f"{self.label} on {site.quoted}: expected a linear layer, got "
            f"{type(site.module).__name__}; exclude it or use LoRA there",
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
