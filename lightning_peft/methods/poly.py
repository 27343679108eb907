"""Poly: low-rank skills that each task mixes by itself. Ponti et al. 2022, arXiv:2202.13914; with
several splits MHR, Caccia et al. 2022, arXiv:2211.03831.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFFormat, WeightMethod
from lightning_peft.methods.exchange import config_keys, refuse_all_but_linear
from lightning_peft.methods.limits import at_least
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import linear_layer, one_matrix, require_divisor
from lightning_peft.methods.tasks import MixedSkills
from lightning_peft.methods.tensors import empty_like_site, kaiming

__all__ = ["Poly"]


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

    limits = dict.fromkeys(("r", "tasks", "skills", "splits"), at_least(1))
    site_rules = (one_matrix, linear_layer)
    hf = HFFormat(
        peft_type="POLY",
        tensors={"A": "poly_lora_A", "B": "poly_lora_B", "logits": "poly_router.module_logits"},
        config=config_keys("r", tasks="n_tasks", skills="n_skills", splits="n_splits"),
        own_defaults=True,
        fixed={"poly_type": "poly"},
        inert={"init_weights": True},
        defaults={"poly_type": "poly"},
        refuse=refuse_all_but_linear,
    )

    @property
    def reads_batch(self) -> bool:
        """The task of each sample."""
        return True

    def check(self, site: Site) -> None:
        """A linear layer whose features the splits divide."""
        super().check(site)
        require_divisor(self, site, "splits", self.splits)

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
