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
from lightning_peft.core.edit import Edit
from lightning_peft.core.input_dtype import to_adapter_dtype
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, Term
from lightning_peft.methods import lora_exchange
from lightning_peft.methods.base import StepContext
from lightning_peft.methods.checks import empty_like_site, require, require_matrix
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.lora_exchange import nested_config
from lightning_peft.methods.registry import register

__all__ = ["Compressed", "VeLoRA"]

_CONFIG = nested_config(
    "velora_config", {"groups": "num_groups", "scale": "scale", "direction": "init_type"}
)


@dataclass(frozen=True)
class Compressed(Term):
    """A low-rank change that keeps x [n, in] for the backward as c [n, groups] alone.

    Each row of x is cut into groups of length d; c is their product with v [d], and dA is formed
    with scale · c ⊗ v in place of x. The output and the gradient of x are exact.

    Attributes:
        low_rank: The change.
        v: Unit vector, or zeros where the first batch sets it.
        groups: Number of groups.
        scale: Factor on what is put in place of x.
        direction: As in `VeLoRA`.
    """

    low_rank: LowRank
    v: Tensor
    groups: int
    scale: float
    direction: str

    def matrix(self) -> Tensor:
        """ΔW, formed."""
        return self.low_rank.matrix()

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products; the first has no part in the gradient of A."""
        A, B = self.low_rank.A, self.low_rank.B
        x = to_adapter_dtype(x, A)
        padding = self.groups * len(self.v) - x.shape[-1]
        with torch.no_grad():
            parts = F.pad(x, (0, padding)).unflatten(-1, (self.groups, len(self.v)))
            v = self._vector(parts).to(parts.dtype)
            c = parts @ v
        folded = F.pad(A, (0, padding)).unflatten(-1, (self.groups, len(v))) @ v.to(A.dtype)
        u = self.scale * F.linear(c, folded)
        h = F.linear(x, A.detach()) + (u - u.detach())  # adds zero: a gradient and no value
        return F.linear(h * self.low_rank.scaling, B)

    def _vector(self, parts: Tensor) -> Tensor:
        if self.direction == "random":
            return self.v
        mean = parts.float().flatten(0, -2).mean(dim=0)
        mean = torch.where(mean.any(), mean, torch.ones_like(mean))
        mean = mean / torch.linalg.vector_norm(mean)
        if self.direction == "batch_average_once":
            mean = torch.where(self.v.any(), self.v.float(), mean)
            self.v.copy_(mean)
        return mean


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

    hf = dataclasses.replace(
        lora_exchange.FORMAT,
        tensors={**lora_exchange.FORMAT.tensors, "v": "lora_velora_embed"},
        optional=("v",),
        when={**lora_exchange.FORMAT.when, "velora_config": True},
        to_config=_CONFIG[0],
        from_config=_CONFIG[1],
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        directions = ("batch_average", "batch_average_once", "random")
        require(
            self.groups >= 1 and self.scale > 0 and self.direction in directions,
            f"{self.label}: expected groups >= 1, scale > 0 and direction in {directions}, got "
            f"{self.groups}, {self.scale}, {self.direction!r}",
        )
        require(
            not self._frozen,
            f"{self.label}: expected a trained A, got freeze_A={self.freeze_A}, init={self.init!r}",
        )

    def check(self, site: Site) -> None:
        """A layer that runs row by row."""
        super().check(site)
        require_matrix(self.label, site)
        require(
            site.ops.features_last,
            f"{self.label} on {site.quoted}: expected a linear layer, got "
            f"{type(site.module).__name__}; exclude it or use LoRA there",
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
