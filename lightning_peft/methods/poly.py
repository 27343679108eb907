"""Poly: low-rank skills that each task mixes by itself. Ponti et al. 2022, arXiv:2202.13914; with
several splits MHR, Caccia et al. 2022, arXiv:2211.03831.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.input_dtype import to_adapter_dtype
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import NotMergeable, Term
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.checks import empty_like_site, kaiming, require, require_matrix
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.registry import register
from lightning_peft.methods.tasks import tasks_of_rows

__all__ = ["MixedSkills", "Poly"]


@dataclass(frozen=True)
class MixedSkills(Term):
    """x A B / r, with A and B mixed for each sample by the weights of its task.

    Attributes:
        A: [splits, skills, in / splits, r].
        B: [splits, skills, r, out / splits].
        logits: [tasks, splits · skills].
        tasks: [samples]; None where no task is known.
    """

    A: Tensor
    B: Tensor
    logits: Tensor
    tasks: Tensor | None

    def matrix(self) -> Tensor:
        """None: it depends on the task."""
        raise NotMergeable("it depends on the task of each sample")

    def weights(self, site: Site, rows: int) -> Tensor:
        """Weights of the skills [rows, splits, skills]; in training they are drawn."""
        tasks = tasks_of_rows(self.tasks, rows, len(self.logits), site.label)
        chosen = self.logits[tasks.to(self.logits.device)].unflatten(-1, self.A.shape[:2])
        if site.module.training:  # a relaxed Bernoulli variable of temperature 1
            eps = torch.finfo(chosen.dtype).eps
            u = torch.rand_like(chosen).clamp(eps, 1 - eps)
            chosen = chosen + u.log() - (-u).log1p()
        w = torch.sigmoid(chosen)
        return w / (w.sum(-1, keepdim=True) + 1e-12)

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products per sample."""
        x = to_adapter_dtype(x, self.A)
        w = self.weights(site, len(x)).to(self.A.dtype)
        A = torch.einsum("bqs,qsdr->bqdr", w, self.A).flatten(1, 2)
        B = torch.einsum("bqs,qsrd->brqd", w, self.B).flatten(2)
        y = x.reshape(len(x), -1, x.shape[-1]) @ A @ B / self.A.shape[-1]
        return y.reshape(*x.shape[:-1], -1)


@register
@dataclass(frozen=True)
class Poly(WeightMethod):
    """Skills that the tasks share, and for each task a trained mixture of them.

    Run the model inside ``with task_ids([...])``, which says the task of each sample. It has no
    merged form.

    Attributes:
        r: Rank of a skill.
        tasks: Number of tasks.
        skills: Number of skills per layer.
        splits: Parts of the features with a mixture each (MHR); divides in and out.

    Raises:
        ValueError: a number below 1; splits that do not divide a layer's features.
    """

    r: int = 8
    tasks: int = 1
    skills: int = 4
    splits: int = 1

    mergeable: ClassVar[bool] = False

    hf = HFFormat(
        peft_type="POLY",
        tensors={"A": "poly_lora_A", "B": "poly_lora_B", "logits": "poly_router.module_logits"},
        config={"r": "r", "tasks": "n_tasks", "skills": "n_skills", "splits": "n_splits"},
        fixed={"poly_type": "poly", "init_weights": True},
        defaults={"n_tasks": 1, "n_skills": 4, "n_splits": 1, "poly_type": "poly"},
        ignored=("init_weights",),
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        numbers = (self.r, self.tasks, self.skills, self.splits)
        require(
            min(numbers) >= 1,
            f"{self.label}: expected r, tasks, skills and splits >= 1, got {numbers}",
        )

    @property
    def reads_batch(self) -> bool:
        """The task of each sample."""
        return True

    def check(self, site: Site) -> None:
        """A linear layer whose features the splits divide."""
        require_matrix(self.label, site)
        require(
            site.ops.features_last and not site.is_embedding,
            f"{self.label} on {site.quoted}: expected a linear layer, got "
            f"{type(site.module).__name__}; exclude it or use LoRA there",
        )
        require(
            site.in_features % self.splits == 0 and site.out_features % self.splits == 0,
            f"{self.label} on {site.quoted}: expected splits that divide in_features and "
            f"out_features, got splits = {self.splits} with {site.in_features} and "
            f"{site.out_features}",
        )

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A Kaiming-uniform, B zero, logits within ± 0.001."""
        q, s, r = self.splits, self.skills, self.r
        A = kaiming(empty_like_site(site, q, s, r, site.in_features // q)).mT.contiguous()
        B = empty_like_site(site, q, s, r, site.out_features // q).zero_()
        logits = empty_like_site(site, self.tasks, q * s).uniform_(-1e-3, 1e-3)
        return {"A": A, "B": B, "logits": logits}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """The mixed skills."""
        return Edit(terms=(MixedSkills(p["A"], p["B"], p["logits"], p.get("tasks")),))
