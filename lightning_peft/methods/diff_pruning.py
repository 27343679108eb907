"""DiffPruning: a sparse change of the weights.  W' = W + z ∘ w,  z = gate(α) in [0, 1].

The gates are hard-concrete (`lightning_peft.core.hard_concrete`): drawn in training, at their mean
in eval and when merging. The expected number of open ones is added to the loss.

Source: Guo et al. 2021, "Parameter-Efficient Transfer Learning with Diff Pruning", equations 3–5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.hard_concrete import gate, keep_largest, open_probability
from lightning_peft.core.site import Site
from lightning_peft.core.terms import Dense
from lightning_peft.methods.base import StepContext, WeightMethod
from lightning_peft.methods.limits import SHARE, above, at_least, between
from lightning_peft.methods.registry import register
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["DiffPruning"]


@register
@dataclass(frozen=True)
class DiffPruning(WeightMethod):
    """Sparse difference with an L0 penalty.

    Costs: two trained values a weight, so twice the parameters of the layers it is on, and the
    optimizer's state for them.

    Attributes:
        l0: Weight λ of the expected number of open gates, divided by the number of gates.
        alpha_init: Start of α; 5 means open gates.
        temperature: τ at the start.
        final_temperature: τ at the end of the run; it falls geometrically.
        structured: One further gate a matrix, which closes it whole.
        density: Share of weights left changed; None leaves it to the penalty.
        fix_at: Share of the run after which the mask is fixed to the largest |z ∘ w| (needs
            `density`).
        sample: Whether gates are sampled in training; without it they follow their mean.
    """

    l0: float = 1e-3
    alpha_init: float = 5.0
    temperature: float = 2 / 3
    final_temperature: float = 2 / 3
    structured: bool = False
    density: float | None = None
    fix_at: float = 0.5
    sample: bool = True

    limits = {
        "l0": at_least(0),
        "temperature": above(0),
        "final_temperature": above(0),
        "density": SHARE,
        "fix_at": between(0, 1),
    }

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """w [*, out, in] zeros, alpha [*, out, in]; alpha_group [*, 1, 1] where structured."""
        p = {"w": self._full(site, 0.0), "alpha": self._full(site, self.alpha_init)}
        if self.structured:
            p["alpha_group"] = nn.init.constant_(empty_like_site(site, 1, 1), self.alpha_init)
        return p

    def _full(self, site: Site, value: float) -> Tensor:
        return empty_like_site(site, site.out_features, site.in_features).fill_(value)

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """tau and fixed [1]; mask [*, out, in] if `density` is given."""
        b = {"tau": torch.full((1,), self.temperature), "fixed": torch.zeros(1)}
        return b if self.density is None else {**b, "mask": self._full(site, 1.0)}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """W + z ∘ w; gates are sampled only in a training forward."""
        sampled = self.sample and site.module.training and torch.is_grad_enabled()
        return Edit(terms=(Dense(self._gates(p, sampled) * p["w"]),))

    def _gates(self, p: Mapping[str, Tensor], sampled: bool) -> Tensor:
        z = gate(p["alpha"], p["tau"], sampled)
        if self.structured:
            z = z * gate(p["alpha_group"], p["tau"], sampled)
        # No branch on a tensor: one graph under torch.compile.
        return torch.where(p["fixed"] > 0, p["mask"], z) if "mask" in p else z

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """λ · expected share of open gates, until the mask is fixed."""
        if self.l0 == 0:
            return None
        total, count = torch.zeros(()), 0
        for _, p in ctx.entries:
            open_ = open_probability(p["alpha"], p["tau"])
            if self.structured:
                open_ = open_ * open_probability(p["alpha_group"], p["tau"])
            total = total.to(open_.device) + (open_ * (1 - p["fixed"])).sum()
            count += open_.numel()
        return self.l0 * total / max(1, count)

    def after_step(self, ctx: StepContext) -> None:
        """Lower the temperature; once, fix the mask to the largest changes of all layers."""
        if ctx.total_steps is None:
            return
        share = min(1.0, ctx.step / max(1, ctx.total_steps))
        tau = self.temperature * (self.final_temperature / self.temperature) ** share
        for _, p in ctx.entries:
            p["tau"].fill_(tau)
        if self.density is None or share < self.fix_at:
            return
        entries = [p for _, p in ctx.entries if not bool(p["fixed"])]
        deltas = [(self._gates(p, False) * p["w"]) for p in entries]
        masks = keep_largest(deltas, self.density)
        for p, delta, mask in zip(entries, deltas, masks, strict=True):
            p["mask"].copy_(mask.to(p["mask"].dtype))
            p["w"].copy_(delta)
            p["fixed"].fill_(1.0)
