"""Low-rank changes that are drawn around their mean in training; the mean is what is merged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, Term

__all__ = ["Drawn", "Sampled", "divergence"]


@dataclass(frozen=True)
class Sampled(Term):
    """b ∘ B z with z = μ + ε e^{l/2}, [μ; l] = d ∘ A x; merged and without sampling z = μ.

    The vectors multiply thin activations and the output, so that no product makes a gradient of A
    or B.

    Attributes:
        A: [2r, in], frozen.
        B: [out, r], frozen.
        d: [2r].
        b: [out].
        sample: Whether training samples.
        always: Whether eval samples too.
    """

    A: Tensor
    B: Tensor
    d: Tensor
    b: Tensor
    sample: bool
    always: bool

    def to_mean(self) -> LowRank:
        """The change by the mean."""
        r = self.B.shape[1]
        return LowRank(self.d[:r].unsqueeze(-1) * self.A[:r], self.b.unsqueeze(-1) * self.B)

    def matrix(self) -> Tensor:
        """ΔW of the mean."""
        return self.to_mean().matrix()

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products with noise between, in training."""
        if not ops.features_last:
            return self.to_mean().apply(ops, site, x)
        r = self.B.shape[1]
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype)
        if not (self.always or (self.sample and site.module.training)):
            return F.linear(F.linear(x, self.A[:r]) * self.d[:r], self.B) * self.b
        mean, log_variance = (F.linear(x, self.A) * self.d).chunk(2, dim=-1)
        deviation = torch.exp(0.5 * log_variance)
        return F.linear(mean + torch.randn_like(deviation) * deviation, self.B) * self.b


@dataclass(frozen=True)
class Drawn(Term):
    """A low-rank change with A + noise · ‖w‖ · diag(σ) Z in place of A.

    The mean over samples with weights w that add up to one is one normal draw Z of that width.

    Attributes:
        low_rank: The change by the mean.
        log_std: [r].
        log_concentration: [samples], of the Dirichlet distribution of w.
        noise: Factor on the noise.
    """

    low_rank: LowRank
    log_std: Tensor
    log_concentration: Tensor
    noise: float

    def matrix(self) -> Tensor:
        """ΔW by the mean."""
        return self.low_rank.matrix()

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products with a drawn A."""
        A = self.low_rank.A
        r, n = len(self.log_std), len(self.log_concentration)
        # Diagonal of a Wishart matrix with r degrees of freedom and scale diag(std²).
        spread = torch.randn(r, r, device=A.device).square().sum(0)
        variance = (torch.exp(2 * self.log_std) * spread).clamp(min=1e-3)
        a = self.log_concentration
        inverse = torch.exp(-a)
        width = inverse * (1 - 2 / n) + inverse.sum() / n**2
        logits = a - a.mean() + width.clamp(min=1e-6).sqrt() * torch.randn_like(a)
        std = variance.sqrt() * torch.linalg.vector_norm(logits.softmax(0))
        drawn = A + self.noise * std.to(A.dtype).unsqueeze(-1) * torch.randn_like(A)
        return dataclasses.replace(self.low_rank, A=drawn).apply(ops, site, x)


def divergence(log_std: Tensor, log_concentration: Tensor, concentration: float) -> Tensor:
    """Expected divergence of what `Drawn` draws from its priors: the weights of the samples from a
    Dirichlet distribution of this concentration, the variance and the noise from standard ones.
    """
    r, n = len(log_std), len(log_concentration)
    a, prior = torch.exp(log_concentration), torch.full_like(log_concentration, concentration)
    dirichlet = (
        torch.lgamma(a.sum())
        - torch.lgamma(a).sum()
        - torch.lgamma(prior.sum())
        + torch.lgamma(prior).sum()
        + ((a - prior) * (torch.digamma(a) - torch.digamma(a.sum()))).sum()
    )
    variance, log_variance = torch.exp(2 * log_std), 2 * log_std
    wishart = 0.5 * r * (variance - log_variance - 1).sum()
    half = log_std.new_full((), r / 2)
    expected_log = log_variance + torch.digamma(half) + torch.log(2 * torch.ones_like(half))
    normal = 0.5 * n * (r * variance - expected_log - 1).sum()
    return dirichlet + wishart + normal
