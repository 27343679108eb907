"""KaSA: LoRA with singular values of its own, on a base without its smallest ones.

Wang et al. 2024, arXiv:2412.06071.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.projection import distance_to_orthonormal
from lightning_peft.core.site import Site
from lightning_peft.methods.base import StepContext
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.formats import lora as lora_format
from lightning_peft.methods.formats.lora import nested_config
from lightning_peft.methods.limits import at_least, only
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import features_in, one_matrix, require_rank
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["KaSA"]


_CONFIG = nested_config("kasa_config", {"beta": "beta", "gamma": "gamma"})


@register
@dataclass(frozen=True)
class KaSA(LoRA):
    """W' = W₋ + s B diag(d) A; W₋ is W without its r smallest singular triplets.

    The output changes at the start: what was taken out of the base is not made up for. Detaching
    and switching off put the base's bits back, which peft does not.

    Attributes:
        r, alpha, dropout, …: As for LoRA; r < min(in, out).
        beta: Weight of Σ d² in the loss.
        gamma: Weight of ‖BᵀB − I‖ + ‖A Aᵀ − I‖ in the loss.

    Raises:
        ValueError: as LoRA; beta or gamma < 0, another start than the default, lora_bias, freeze_A,
            precondition.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    limits = {
        "init": only("default"),
        "lora_bias": only(False),
        "freeze_A": only(False),
        "precondition": only(False),
        "beta": at_least(0),
        "gamma": at_least(0),
    }
    site_rules = (features_in, one_matrix)
    hf = dataclasses.replace(
        lora_format.FORMAT,
        tensors={**lora_format.FORMAT.tensors, "d": "lora_diag"},
        when={**lora_format.FORMAT.when, "kasa_config": True},
        to_config=_CONFIG[0],
        from_config=_CONFIG[1],
        uniform=None,
        refuse=refuse_all_but_linear,
    )

    def check(self, site: Site) -> None:
        """The base keeps a triplet at least."""
        super().check(site)
        require_rank(self, site, self.rank(site), below=True)

    @property
    def rewrites_base(self) -> bool:
        """The smallest triplets go."""
        return True

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A and B as LoRA; d [r] normal."""
        d = torch.nn.init.normal_(empty_like_site(site, self.rank(site)))
        return {**super().parameters(site), "d": d}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """None: the base is not made up for."""
        return {}

    def initialise(self, p: dict[str, Tensor], site: Site, W: Tensor) -> Tensor | None:
        """W without its r smallest singular triplets."""
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        keep = len(S) - self.rank(site)
        kept: Tensor = (U[:, :keep] * S[:keep]) @ Vh[:keep]
        return kept

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """LoRA's change with d between the factors."""
        return super().edit({**p, "B": p["B"] * p["d"]}, site)

    def penalty(self, ctx: StepContext) -> Tensor | None:
        """β Σ d² + γ (‖BᵀB − I‖ + ‖A Aᵀ − I‖), summed over layers."""
        terms = []
        for _, p in ctx.entries:
            A, B, d = p["A"], p["B"], p["d"]
            skew = distance_to_orthonormal(B.mT) + distance_to_orthonormal(A)
            terms.append(self.beta * d.square().sum() + self.gamma * skew)
        return torch.stack(terms).sum() if terms else None
