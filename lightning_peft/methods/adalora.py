"""AdaLoRA: ΔW = s · B diag(E) A, triplets pruned to a budget by importance. Zhang et al. 2023,
arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.edit import Edit
from lightning_peft.core.names import matches_suffix
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import HFEntry, HFFormat, StepContext, WeightMethod
from lightning_peft.methods.checks import empty_like_site, require, require_bias, require_shape
from lightning_peft.methods.registry import register

__all__ = ["AdaLoRA"]

_TRIPLET = ("A", "B", "E")


def _pack(method: AdaLoRA, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the triplets that are left, as peft saves them."""
    kept = p["mask"].bool()
    return {"A": p["A"][kept], "B": p["B"][:, kept], "E": p["E"][kept].unsqueeze(1)}


def _unpack(
    method: AdaLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Back into `init_r` places; E is zero in those that were pruned."""
    kept = _pattern(config, site)
    if kept is None:
        kept = torch.ones(method.init_r, dtype=torch.bool)
    n = int(kept.sum())
    if not {"A", "B", "E"} <= set(p):
        return dict(p)
    if p["A"].shape[0] != n or p["B"].shape[1] != n:
        raise ValueError(f"expected {n} triplets by rank_pattern")
    require_shape("lora_E", p["E"], (n, 1))
    A = torch.zeros(len(kept), p["A"].shape[1], dtype=p["A"].dtype)
    B = torch.zeros(p["B"].shape[0], len(kept), dtype=p["B"].dtype)
    E = torch.zeros(len(kept), dtype=p["E"].dtype)
    A[kept], B[:, kept], E[kept] = p["A"], p["B"], p["E"].reshape(-1)
    return {"A": A, "B": B, "E": E, "mask": kept.float()}


def _pattern(config: Mapping[str, Any], site: Site) -> Tensor | None:
    for key, kept in (config.get("rank_pattern") or {}).items():
        name = key.removesuffix(".lora_E")
        if matches_suffix(site.name, [name]):
            return torch.tensor(kept, dtype=torch.bool)
    return None


def _refuse(method: AdaLoRA, site: Site) -> str:
    grouped = getattr(site.module, "groups", 1) != 1
    return "peft's AdaLoRA knows no grouped convolution" if grouped else ""


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    masks = {e.path: e.own["mask"].bool().tolist() for e in entries}
    pruned = any(not all(mask) for mask in masks.values())
    config["rank_pattern"] = {f"{n}.lora_E": m for n, m in masks.items()} if pruned else None
    # peft asks for the number of steps of a run that is over.
    config["total_step"] = config["total_step"] or config["tinit"] + config["tfinal"] + 1


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(
        isinstance(v, list) and v and all(isinstance(x, bool) for x in v) for v in pattern.values()
    ):
        raise ValueError(
            "adapter_config.json: rank_pattern: expected layer names with lists of true and false"
        )
    lengths = {len(v) for v in pattern.values()}
    if len(lengths) > 1:
        raise ValueError(
            f"adapter_config.json: rank_pattern: expected one length, got {sorted(lengths)}"
        )
    return {"init_r": lengths.pop()} if lengths else {}


@register
@dataclass(frozen=True)
class AdaLoRA(WeightMethod):
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

    hf = HFFormat(
        peft_type="ADALORA",
        tensors={"A": "lora_A", "B": "lora_B", "E": "lora_E"},
        config={
            "bias": "bias",
            "init_r": "init_r",
            "target_r": "target_r",
            "alpha": "lora_alpha",
            "tinit": "tinit",
            "tfinal": "tfinal",
            "deltaT": "deltaT",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orth_reg_weight",
            "total_step": "total_step",
            "dropout": "lora_dropout",
        },
        fixed={"r": 8, "fan_in_fan_out": False, "init_lora_weights": True},
        defaults={
            "bias": "none",
            "target_r": 8,
            "tinit": 0,
            "tfinal": 0,
            "deltaT": 1,
            "beta1": 0.85,
            "beta2": 0.85,
            "orth_reg_weight": 0.5,
            "total_step": None,
            "lora_dropout": 0.0,
            "rank_pattern": None,
        },
        ignored=(
            *("init_lora_weights", "fan_in_fan_out", "r", "loftq_config", "lora_bias"),
            *("megatron_core", "eva_config", "corda_config", "lora_ga_config"),
            *("ensure_weight_tying", "qalora_group_size", "alpha_pattern"),
        ),
        pack=_pack,
        unpack=_unpack,
        to_config=_to_config,
        from_config=_from_config,
        kinds=("Linear", "Conv1D", "Conv2d"),
        follows=("dilation",),
        refuse=_refuse,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_bias(self.label, self.bias, "lora_only")
        require(self.init_r >= 1, f"{self.label}: expected init_r >= 1, got {self.init_r}")
        require(
            1 <= self.target_r <= self.init_r,
            f"{self.label}: expected 1 <= target_r <= init_r = {self.init_r}, got {self.target_r}",
        )
        require(self.alpha > 0, f"{self.label}: expected alpha > 0, got {self.alpha}")
        require(
            self.tinit >= 0 and self.tfinal >= 0 and self.deltaT >= 1,
            f"{self.label}: expected tinit >= 0, tfinal >= 0, deltaT >= 1, got {self.tinit}, "
            f"{self.tfinal}, {self.deltaT}",
        )
        require(
            self.orth_reg_weight >= 0,
            f"{self.label}: expected orth_reg_weight >= 0, got {self.orth_reg_weight}",
        )
        for name in ("beta1", "beta2", "dropout"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{self.label}: expected 0 <= {name} < 1, got {value}")
        require(
            self.total_step is None or self.total_step > self.tinit + self.tfinal,
            f"{self.label}: expected total_step > tinit + tfinal = {self.tinit + self.tfinal}, got "
            f"{self.total_step}",
        )

    def check(self, site: Site) -> None:
        """One budget over matrices, not over stacks of experts. The rank may exceed the layer's
        size, as in peft: the budget prunes it.
        """
        require(
            not site.batch_shape,
            f"{self.label} on {site.quoted}: expected one matrix, got a stack of experts; "
            "exclude it or use LoRA there",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [r, in], B [out, r] normal (σ = 0.02), E [r] zeros."""
        A = empty_like_site(site, self.init_r, site.in_features)
        B = empty_like_site(site, site.out_features, self.init_r)
        E = empty_like_site(site, self.init_r).zero_()
        return {"A": nn.init.normal_(A, std=0.02), "B": nn.init.normal_(B, std=0.02), "E": E}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Importance and uncertainty of every element, and which triplets are left."""
        shapes = {
            "A": (self.init_r, site.in_features),
            "B": (site.out_features, self.init_r),
            "E": (self.init_r,),
        }
        kept = torch.nn.init.ones_(empty_like_site(site, self.init_r))
        return {
            **{f"importance_{k}": empty_like_site(site, *s).zero_() for k, s in shapes.items()},
            **{f"uncertainty_{k}": empty_like_site(site, *s).zero_() for k, s in shapes.items()},
            "mask": kept,
        }

    def trained_biases(self) -> str:
        """Return the biases of the base that `bias` chooses."""
        return self.bias if self.bias in ("none", "all") else "adapted"

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """A low-rank change; s does not follow the pruning."""
        term = LowRank(p["E"].unsqueeze(-1) * p["A"], p["B"], self.alpha / (self.init_r + 1e-5))
        return Edit(terms=(term,), dropout=self.dropout)

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """λ/n Σ ‖P Pᵀ − I‖_F over A and Bᵀ of all layers."""
        if not self.orth_reg_weight:
            return None
        total: Tensor | None = None
        for _, p in ctx.entries:
            for P in (p["A"], p["B"].mT):
                eye = torch.eye(P.shape[0], dtype=P.dtype, device=P.device)
                norm = torch.linalg.matrix_norm(P @ P.mT - eye)
                total = norm if total is None else total + norm
        return None if total is None else self.orth_reg_weight / (2 * len(ctx.entries)) * total

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
                self._accumulate(p)
        due = self.tinit < ctx.step < total - self.tfinal and ctx.step % self.deltaT == 0
        if due or ctx.step == total - self.tfinal:
            self._prune(ctx, self.budget(ctx.step, total, len(ctx.entries)))
        elif ctx.step > total - self.tfinal:
            for _, p in ctx.entries:
                p["E"].mul_(p["mask"].to(p["E"].dtype))

    def _accumulate(self, p: Mapping[str, Tensor]) -> None:
        gradients = {k: g for k in _TRIPLET if (g := p[k].grad) is not None}
        if not gradients:
            return
        present = list(gradients)
        now = torch._foreach_mul([p[k].detach() for k in present], list(gradients.values()))
        torch._foreach_abs_(now)
        importance = [p[f"importance_{k}"] for k in present]
        uncertainty = [p[f"uncertainty_{k}"] for k in present]
        torch._foreach_lerp_(
            importance,
            [t.to(i.dtype) for t, i in zip(now, importance, strict=True)],
            1 - self.beta1,
        )
        gap = torch._foreach_sub(list(now), importance)
        torch._foreach_abs_(gap)
        torch._foreach_lerp_(
            uncertainty,
            [t.to(u.dtype) for t, u in zip(gap, uncertainty, strict=True)],
            1 - self.beta2,
        )

    def _prune(self, ctx: StepContext, budget: int) -> None:
        scores = [self._score(p) for _, p in ctx.entries]
        out = sum(len(s) for s in scores) - budget
        threshold = None
        if out > 0:
            threshold = torch.cat([s.to(scores[0].device) for s in scores]).kthvalue(out).values
        for (_, p), score in zip(ctx.entries, scores, strict=True):
            if threshold is None:
                p["mask"].fill_(1.0)
            else:
                p["mask"].copy_(score > threshold.to(score.device))
            p["E"].mul_(p["mask"].to(p["E"].dtype))

    def _score(self, p: Mapping[str, Tensor]) -> Tensor:
        """[r]: E's importance · uncertainty, with the means over A's row and B's column."""
        a, b, e = (p[f"importance_{k}"] * p[f"uncertainty_{k}"] for k in _TRIPLET)
        return e + a.mean(1) + b.mean(0)
