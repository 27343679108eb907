"""AdaLoRA: ΔW = s · B diag(E) A, triplets pruned to a budget by importance. Zhang et al. 2023,
arXiv:2303.10512.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.projection import distance_to_orthonormal
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.adalora_importance import accumulate, empty_triplets, prune
from lightning_peft.methods.base import StepContext
from lightning_peft.methods.bias_option import BiasOption
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.adalora import FORMAT
from lightning_peft.methods.limits import FRACTION, above, at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["AdaLoRA"]


@register
@dataclass(frozen=True)
class AdaLoRA(BiasOption):
    """Low rank by triplets (a, e, b): starts with `init_r` a layer, ends with `target_r` on
    average, the least important ones of all layers masked step by step.

    The orthogonality term's gradient is added once an optimizer step, before clipping.

    Attributes:
        init_r: Triplets of each layer at the start.
        target_r: Average at the end; equal to init_r: nothing is pruned.
        alpha: s = alpha / init_r.
        tinit: Steps before pruning starts.
        tfinal: Steps at the end with the final budget.
        deltaT: Steps between two prunings.
        beta1, beta2: Decay rates of the averages of importance and of its uncertainty.
        orth_reg_weight: Weight of Σ ‖A Aᵀ − I‖ + ‖Bᵀ B − I‖, averaged over tensors.
        total_step: Optimizer steps of the run; None takes the trainer's.
        dropout: Probability of dropping an input element of the branch, in training.
        bias: Biases of the base that are trained too: ``"none"``, ``"all"``, ``"lora_only"``.

    Raises:
        ValueError: init_r < 1, target_r outside [1, init_r], negative steps, betas outside [0, 1).
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float = 12.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"

    limits = {
        "init_r": at_least(1),
        "alpha": above(0),
        "tinit": at_least(0),
        "tfinal": at_least(0),
        "deltaT": at_least(1),
        "orth_reg_weight": at_least(0),
        "beta1": FRACTION,
        "beta2": FRACTION,
        "dropout": FRACTION,
    }
    # The rank may exceed the size of a layer, as in peft: the budget prunes it.
    site_rules = (one_matrix,)
    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            1 <= self.target_r <= self.init_r,
            f"{self.label}: expected 1 <= target_r <= init_r = {self.init_r}, got {self.target_r}",
        )
        require(
            self.total_step is None or self.total_step > self.tinit + self.tfinal,
            f"{self.label}: expected total_step > tinit + tfinal = {self.tinit + self.tfinal}, got "
            f"{self.total_step}",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [r, in], B [out, r] normal (σ = 0.02), E [r] zeros."""
        p = empty_triplets(site, self.init_r)
        for name in ("A", "B"):
            nn.init.normal_(p[name], std=0.02)
        p["E"].zero_()
        return p

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Importance and uncertainty of every element, and which triplets are left."""
        averages = {
            f"{kind}_{name}": t.zero_()
            for kind in ("importance", "uncertainty")
            for name, t in empty_triplets(site, self.init_r).items()
        }
        return {**averages, "mask": nn.init.ones_(empty_like_site(site, self.init_r))}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change; s does not follow the pruning."""
        term = LowRank(p["E"].unsqueeze(-1) * p["A"], p["B"], self.alpha / (self.init_r + 1e-5))
        return Edit(terms=(term,), dropout=self.dropout)

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """λ/n Σ ‖P Pᵀ − I‖_F over A and Bᵀ of all layers."""
        if not self.orth_reg_weight:
            return None
        norms = [distance_to_orthonormal(P) for _, p in ctx.entries for P in (p["A"], p["B"].mT)]
        if not norms:
            return None
        return self.orth_reg_weight / len(norms) * functools.reduce(torch.add, norms)

    # ---- the budget
    def budget(self, step: int, total: int, layers: int) -> int:
        """Triplets of all layers together at a step."""
        first, last = self.init_r * layers, self.target_r * layers
        if step <= self.tinit:
            return first
        if step >= total - self.tfinal:
            return last
        left = 1 - (step - self.tinit) / (total - self.tfinal - self.tinit)
        return int((first - last) * left**3 + last)

    def after_step(self, ctx: StepContext) -> None:
        """Accumulate importance, mask by the schedule, keep masked triplets at zero."""
        total = self.total_step or ctx.total_steps
        if total is None:
            raise ValueError(
                f"{self.label}: expected the number of steps, got a run without an end; set "
                "total_step, or max_steps or max_epochs of the Trainer"
            )
        if ctx.step < total - self.tfinal:
            for _, p in ctx.entries:
                accumulate(p, self.beta1, self.beta2)
        due = self.tinit < ctx.step < total - self.tfinal and ctx.step % self.deltaT == 0
        if due or ctx.step == total - self.tfinal:
            prune([p for _, p in ctx.entries], self.budget(ctx.step, total, len(ctx.entries)))
        elif ctx.step > total - self.tfinal:
            for _, p in ctx.entries:
                p["E"].mul_(p["mask"].to(p["E"].dtype))
