"""VeRA: low rank with random frozen factors that all layers share, two vectors a layer trained.
Kopiczko et al. 2023, arXiv:2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.vectors import Vectors
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.exchange import config_keys
from lightning_peft.methods.limits import FRACTION, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site, empty_shared

__all__ = ["VeRA"]


@register
@dataclass(frozen=True)
class VeRA(BiasOption):
    """ΔW = diag(b) B diag(d) A: A [r, in], B [out, r] sliced from one frozen pair, b and d trained.

    Attributes:
        r: Rank of the shared factors; may exceed a layer's size.
        d_initial: Start of d; b starts at zero.
        seed: Seed of the shared factors: Kaiming-uniform, A then B, from a separate generator.
        dropout: Probability of dropping an input element of the branch, in training.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"vera_only"``.

    Raises:
        ValueError: r < 1, dropout outside [0, 1).
    """

    r: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"

    limits = {"r": at_least(1), "dropout": FRACTION}
    hf = HFFormat(
        peft_type="VERA",
        tensors={"b": "vera_lambda_b", "d": "vera_lambda_d"},
        prefix={"A": "base_model.vera_A", "B": "base_model.vera_B"},
        optional=("A", "B"),
        axes={"b": ""},
        config=config_keys(
            "bias", "r", "d_initial", seed="projection_prng_key", dropout="vera_dropout"
        ),
        own_defaults=True,
        fixed={"save_projection": True},
        inert={"fan_in_fan_out": False},
        defaults={"save_projection": True},
        ignored=("init_weights",),
        kinds=("Linear", "Conv1D"),
    )

    def shared_buffers(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """A [r, largest in], B [largest out, r], frozen."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        width = max(site.in_features for site in sites)
        height = max(site.out_features for site in sites)
        factors = {}
        for name, shape in (("A", (self.r, width)), ("B", (height, self.r))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            t = empty_shared(sites, *shape)
            factors[name] = t if t.is_meta else t.uniform_(-bound, bound, generator=generator)
        return factors

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """b [out] zeros, d [r] at d_initial."""
        return {
            "b": empty_like_site(site, site.out_features).zero_(),
            "d": empty_like_site(site, self.r).fill_(self.d_initial),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change; a stack of matrices has its vectors multiplied into the factors."""
        b, d = p["b"], p["d"]
        *batch, out_features, in_features = site.shape
        A, B = p["A"], p["B"]
        if A.shape[1] != in_features:
            A = A.narrow(1, 0, in_features)
        if B.shape[0] != out_features:
            B = B.narrow(0, 0, out_features)
        A, B = A.to(d), B.to(b)
        term = Vectors(A, B, d, b)
        return Edit(terms=(term.to_low_rank() if batch else term,), dropout=self.dropout)
