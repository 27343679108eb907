"""C3A: a block-circulant change of the weight. Chen et al. 2024, arXiv:2407.19342."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lightning_peft.core.circulant import Circulant
from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import match_site
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.limits import at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix, require_divisor
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["C3A", "Circulant"]

_INITS = ("xavier_uniform", "kaiming_uniform", "gaussian", "zeros")


@register
@dataclass(frozen=True)
class C3A(BiasOption):
    """Blocks of circulant matrices, divided by in_features: one number per row of a block.

    Gradients are those of this formula. peft 0.21 has the same forward, but a wrong gradient of the
    layer's input.

    Attributes:
        block_size: b; divides in_features and out_features.
        block_size_pattern: Layer name pattern → block_size.
        init: ``"xavier_uniform"``, ``"kaiming_uniform"``, ``"gaussian"``, or ``"zeros"``, which
            alone leaves the output unchanged at the start.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"c3a_only"``.

    Raises:
        ValueError: block_size < 1, an unknown init.
    """

    block_size: int = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"
    bias: Literal["none", "all", "c3a_only"] = "none"

    limits = {"block_size": at_least(1), "block_size_pattern": at_least(1)}
    site_rules = (one_matrix,)
    hf = HFFormat(
        peft_type="C3A",
        tensors={"c": "c3a_kernel"},
        config=config_keys("bias", "block_size", "block_size_pattern"),
        own_defaults=True,
        inert={"init_weights": "xavier_uniform"},
        refuse=refuse_all_but_linear,
    )

    def check(self, site: Site) -> None:
        """Blocks tile the weight."""
        super().check(site)
        b = match_site(self.block_size_pattern, site, self.block_size)
        require_divisor(self, site, "block_size", b)

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """c [out/b, in/b, b]."""
        b = match_site(self.block_size_pattern, site, self.block_size)
        c = empty_like_site(site, site.out_features // b, site.in_features // b, b)
        if self.init == "gaussian":
            return {"c": nn.init.normal_(c)}
        bound = {
            "xavier_uniform": math.sqrt(6.0 / (site.in_features + site.out_features)),
            "kaiming_uniform": math.sqrt(1.0 / site.in_features),
            "zeros": 0.0,
        }[self.init]
        return {"c": nn.init.uniform_(c, -bound, bound) if bound else c.zero_()}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A circulant change."""
        return Edit(terms=(Circulant(p["c"], 1 / site.in_features),))
