"""BD-LoRA: LoRA with one block-diagonal factor, which shards without communication. Served so by
engines that split layers over several devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.bd_lora import FORMAT
from lightning_peft.methods.limits import at_least, only
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register
from lightning_peft.methods.site_rules import features_in, one_matrix, require_divisor
from lightning_peft.methods.tensors import empty_like_site

__all__ = ["BDLoRA"]


@register
@dataclass(frozen=True)
class BDLoRA(LoRA):
    """W' = W + s B A with A or B of `nblocks` blocks on the diagonal.

    Attributes:
        r, alpha, dropout, …: As for LoRA; nblocks divides r.
        blocks_a: Parts of the layers' own names where A [r, in] is block-diagonal.
        blocks_b: The same for B [out, r].
        nblocks: Blocks; divides the side that is split. The number of devices of the server.
        match_strict: Refuse layers that neither list names; False gives them plain LoRA.

    Raises:
        ValueError: as LoRA; nblocks that does not divide a rank, another start than the default or
            ``"gaussian"``, freeze_A, precondition.
    """

    blocks_a: list[str] = field(default_factory=list)
    blocks_b: list[str] = field(default_factory=list)
    nblocks: int = 1
    match_strict: bool = True

    limits_rank: ClassVar[bool] = False  # the product of two blocks may need it

    limits = {
        "init": only("default"),
        "freeze_A": only(False),
        "precondition": only(False),
        "nblocks": at_least(1),
    }
    site_rules = (features_in, one_matrix)
    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for where, r in {"r": self.r, **self.rank_pattern}.items():
            require(
                r % self.nblocks == 0,
                f"{self.label}: expected nblocks that divides every rank, got nblocks = "
                f"{self.nblocks}, {where} = {r}",
            )

    def split(self, site: Site) -> str:
        """``"A"``, ``"B"`` or ``""``: which factor is block-diagonal here."""
        leaf = site.name.rpartition(".")[2]
        a, b = (any(part in leaf for part in parts) for parts in (self.blocks_a, self.blocks_b))
        require(
            not (a and b),
            f"{self.label} on {site.quoted}: expected a name in one of blocks_a and blocks_b, got "
            "it in both",
        )
        return "A" if a else "B" if b else ""

    def check(self, site: Site) -> None:
        """Blocks tile the factor."""
        super().check(site)
        split, n = self.split(site), self.nblocks
        require(
            bool(split) or not self.match_strict,
            f"{self.label} on {site.quoted}: expected its name in blocks_a or blocks_b, found it "
            "in neither; add it, or give match_strict=False",
        )
        if split:
            require_divisor(self, site, "nblocks", n, ("in",) if split == "A" else ("out",))

    def parameters(self, site: Site) -> dict[str, Tensor]:
        """A [r, in / nblocks] or B [out, r / nblocks] where it is split."""
        p, r, n = super().parameters(site), self.rank(site), self.nblocks
        split = self.split(site)
        if split == "A":
            bound = (6 * n / site.in_features) ** 0.5  # Kaiming-uniform, as peft starts blocks
            p["A"] = empty_like_site(site, r, site.in_features // n).uniform_(-bound, bound)
        elif split == "B":
            p["B"] = empty_like_site(site, site.out_features, r // n).zero_()
        return p

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """LoRA's change of the whole factors."""
        split = self.split(site)
        if not split:
            return super().edit(p, site)
        blocks = p[split].chunk(self.nblocks, dim=0)
        return super().edit({**p, split: torch.block_diag(*blocks)}, site)
