"""MonteCLoRA: LoRA whose A is drawn around its mean in training. Sengupta et al. 2024,
arXiv:2411.04358.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.drawn import Drawn, divergence
from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import StepContext
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.monteclora import FORMAT
from lightning_peft.methods.limits import above, at_least
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import features_in, one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["MonteCLoRA"]


@register
@dataclass(frozen=True)
class MonteCLoRA(LoRA):
    """LoRA with trained noise on A; eval and merging take the mean, which is plain LoRA.

    The callback adds the divergence from the priors to the loss, as a mean over layers.

    Attributes:
        r, alpha, dropout, …: As for LoRA.
        samples: Number of draws that a forward stands for; more make less noise.
        noise: Factor on the noise.
        kl_weight: Weight of the divergence in the loss.
        dirichlet_prior: Concentration that the weights of the draws are held to.
        entropy: Whether Σ w² is added to the loss.

    Raises:
        ValueError: as LoRA; samples < 1, dirichlet_prior ≤ 0, negative weights, freeze_A, the
            starts ``"mica"`` and ``"eva"``.
    """

    samples: int = 8
    noise: float = 1e-4
    kl_weight: float = 1e-5
    dirichlet_prior: float = 0.1
    entropy: bool = False

    limits = {
        "samples": at_least(1),
        "dirichlet_prior": above(0),
        "noise": at_least(0),
        "kl_weight": at_least(0),
    }
    site_rules = (features_in, one_matrix)
    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            not self._frozen and self.init != "eva",
            f"{self.label}: expected a trained A of a fixed rank, got freeze_A={self.freeze_A}, "
            f"init={self.init!r}",
        )

    def check(self, site: Site) -> None:
        """One matrix with features for input."""
        super().check(site)
        require(
            not site.ops.is_opaque,
            f"{self.label} on {site.quoted}: expected a layer that draws A in its forward, got "
            f"{type(site.module).__name__}, which reads merged weights; exclude it or use LoRA",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A and B as LoRA; log_std [r] and log_concentration [samples] uniform in [0, 1)."""
        return {
            **super().parameters(site),
            "log_std": empty_like_site(site, self.rank(site)).uniform_(),
            "log_concentration": empty_like_site(site, self.samples).uniform_(),
        }

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """LoRA's change, drawn in training."""
        edit = super().edit(p, site)
        if not site.module.training:
            return edit
        first, *rest = edit.terms
        assert isinstance(first, LowRank)
        term = Drawn(first, p["log_std"], p["log_concentration"], self.noise)
        return dataclasses.replace(edit, terms=(term, *rest))

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """The expected divergences of the three distributions, averaged over layers."""
        terms = [self._loss(p["log_std"], p["log_concentration"]) for _, p in ctx.entries]
        return torch.stack(terms).mean() if terms else None

    def _loss(self, log_std: Tensor, log_concentration: Tensor) -> Tensor:
        loss = self.kl_weight * divergence(log_std, log_concentration, self.dirichlet_prior)
        mean_weights = (log_concentration - log_concentration.mean()).softmax(0)
        return loss + mean_weights.square().sum() if self.entropy else loss
