"""PVeRA: VeRA with a mean and a variance, sampled in training. arXiv:2512.07703."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.drawn import Sampled
from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import config_keys, refuse_all_but_features
from lightning_peft.methods.limits import FRACTION, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site, empty_shared

__all__ = ["PVeRA"]


@register
@dataclass(frozen=True)
class PVeRA(BiasOption):
    """VeRA whose thin activations are sampled in training; its mean is what is merged.

    Attributes:
        r: Rank of the shared factors; may exceed a layer's size.
        d_initial: Start of d; b starts at zero.
        seed: Seed of the shared factors.
        dropout: Probability of dropping an input element of the branch, in training.
        sample: Whether training samples; False trains the mean alone.
        sample_at_inference: Whether eval samples too.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"pvera_only"``.

    Raises:
        ValueError: r < 1, dropout outside [0, 1), sampling at inference alone.
    """

    r: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0
    sample: bool = True
    sample_at_inference: bool = False
    bias: Literal["none", "all", "pvera_only"] = "none"

    limits = {"r": at_least(1), "dropout": FRACTION}
    site_rules = (one_matrix,)
    hf = HFFormat(
        peft_type="PVERA",
        tensors={"b": "pvera_lambda_b", "d": "pvera_lambda_d"},
        prefix={"A": "base_model.pvera_A", "B": "base_model.pvera_B"},
        optional=("A", "B"),
        config=config_keys(
            "bias",
            "r",
            "d_initial",
            "sample_at_inference",
            seed="projection_prng_key",
            dropout="pvera_dropout",
        ),
        own_defaults=True,
        inert={"fan_in_fan_out": False, "init_weights": True, "save_projection": True},
        ignored=("generator_seed",),
        refuse=refuse_all_but_features,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            self.sample or not self.sample_at_inference,
            f"{self.label}: expected sample=True with sample_at_inference=True, got sample=False",
        )

    def check(self, site: Site) -> None:
        """Noise needs thin activations of features."""
        super().check(site)
        require(
            not self.sample or site.ops.features_last,
            f"{self.label} on {site.quoted}: expected a linear layer, got "
            f"{type(site.module).__name__}; exclude it, or train the mean alone with sample=False",
        )

    def shared_buffers(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """A [2r, largest in], B [largest out, r], frozen; Kaiming-uniform, first A, then B."""
        generator = torch.Generator().manual_seed(self.seed)
        width = max(site.in_features for site in sites)
        height = max(site.out_features for site in sites)
        factors = {}
        for name, shape in (("A", (2 * self.r, width)), ("B", (height, self.r))):
            t = empty_shared(sites, *shape)
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            factors[name] = t if t.is_meta else t.uniform_(-bound, bound, generator=generator)
        return factors

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """b [out] zeros, d [2r] at d_initial."""
        return {
            "b": empty_like_site(site, site.out_features).zero_(),
            "d": empty_like_site(site, 2 * self.r).fill_(self.d_initial),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change, sampled in training."""
        b, d = p["b"], p["d"]
        A = p["A"][:, : site.in_features].to(d.dtype)
        B = p["B"][: site.out_features].to(b.dtype)
        term = Sampled(A, B, d, b, self.sample, self.sample_at_inference)
        return Edit(terms=(term,), dropout=self.dropout)
