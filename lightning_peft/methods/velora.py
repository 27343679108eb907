"""VeLoRA: LoRA whose gradient of A comes from a compressed input. Miles et al. 2024,
arXiv:2405.17991.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.core.collectives import average_on_all_ranks
from lightning_peft.core.compressed import Compressed
from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.base import StepContext
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.formats import lora as lora_format
from lightning_peft.methods.formats.lora import nested_config
from lightning_peft.methods.limits import above, at_least
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import linear_layer, one_matrix
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["VeLoRA"]

_CONFIG = nested_config(
    "velora_config", {"groups": "num_groups", "scale": "scale", "direction": "init_type"}
)


@register
@dataclass(frozen=True)
class VeLoRA(LoRA):
    """LoRA that keeps a compressed input for the backward; its result is plain LoRA.

    Attributes:
        r, alpha, dropout, …: As for LoRA.
        groups: Numbers that are kept per row of the input; more cost memory and lose less.
        scale: Factor on the input that is put together again.
        direction: Vector that groups are projected on: ``"batch_average"`` of each batch,
            ``"batch_average_once"`` of the first, or ``"random"``.

    Raises:
        ValueError: as LoRA; groups < 1, scale ≤ 0, an unknown direction, freeze_A, init="mica".
    """

    groups: int = 64
    scale: float = 1.0
    direction: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    limits = {"groups": at_least(1), "scale": above(0)}
    site_rules = (one_matrix, linear_layer)
    hf = dataclasses.replace(
        lora_format.FORMAT,
        tensors={**lora_format.FORMAT.tensors, "v": "lora_velora_embed"},
        optional=("v",),
        when={**lora_format.FORMAT.when, "velora_config": True},
        to_config=_CONFIG[0],
        from_config=_CONFIG[1],
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            not self._frozen,
            f"{self.label}: expected a trained A, got freeze_A={self.freeze_A}, init={self.init!r}",
        )

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """v [⌈in / groups⌉]: a random direction, or zeros until the first batch."""
        v = empty_like_site(site, -(-site.in_features // self.groups)).zero_()
        if self.direction == "random":
            v = F.normalize(v.normal_(), dim=0)
        return {**super().buffers(site), "v": v}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """LoRA's change, and in training its compressed form."""
        edit = super().edit(p, site)
        if not (site.module.training and torch.is_grad_enabled()):
            return edit
        first, *rest = edit.terms
        assert isinstance(first, LowRank)
        term = Compressed(first, p["v"], self.groups, self.scale, self.direction)
        return dataclasses.replace(edit, terms=(term, *rest))

    @property
    def has_step_hooks(self) -> bool:
        """The direction of the first batch is averaged over processes."""
        return self.precondition or self.direction == "batch_average_once"

    def after_backward(self, ctx: StepContext) -> None:
        """Precondition as LoRA, and give all processes one direction after the first batch."""
        super().after_backward(ctx)
        for _, p in ctx.entries if self.direction == "batch_average_once" and not ctx.step else ():
            average_on_all_ranks(p["v"])
            p["v"].copy_(F.normalize(p["v"], dim=0))
