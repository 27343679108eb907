"""BD-LoRA: LoRA with one block-diagonal factor, which shards without communication. Served so by
engines that split layers over several devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.methods import lora_exchange
from lightning_peft.methods.base import HFEntry
from lightning_peft.methods.checks import empty_like_site, require, require_features, require_matrix
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register

__all__ = ["BDLoRA"]

_KEYS = {
    "blocks_a": "target_modules_bd_a",
    "blocks_b": "target_modules_bd_b",
    "nblocks": "nblocks",
    "match_strict": "match_strict",
}


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    lora_exchange.to_config(entries, config)
    method = entries[0].method
    config["use_bdlora"] = {theirs: getattr(method, ours) for ours, theirs in _KEYS.items()}


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    blocks = config["use_bdlora"]
    if not isinstance(blocks, dict) or set(blocks) - set(_KEYS.values()):
        raise ValueError(
            f"adapter_config.json: use_bdlora: expected {sorted(_KEYS.values())}, got {blocks!r}"
        )
    fields = {
        ours: blocks[theirs] for ours, theirs in _KEYS.items() if blocks.get(theirs) is not None
    }
    return {**lora_exchange.from_config(config, entries, reduces=False), **fields}


def _unpack(
    method: BDLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A and B as they are: blocks have no product to reduce a rank by."""
    return dict(p)


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

    hf = dataclasses.replace(
        lora_exchange.FORMAT,
        when={**lora_exchange.FORMAT.when, "use_bdlora": True},
        unpack=_unpack,
        to_config=_to_config,
        from_config=_from_config,
        uniform=None,
        refuse=refuse_all_but_linear,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for where, r in {"r": self.r, **self.rank_pattern}.items():
            require(
                self.nblocks >= 1 and r % self.nblocks == 0,
                f"{self.label}: expected nblocks >= 1 that divides every rank, got nblocks = "
                f"{self.nblocks}, {where} = {r}",
            )
        require(
            self.init == "default" and not (self.freeze_A or self.precondition),
            f"{self.label}: expected init='default' without freeze_A and precondition, got "
            f"init={self.init!r}, freeze_A={self.freeze_A}, precondition={self.precondition}",
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
        require_features(self.label, site)
        require_matrix(self.label, site)
        split, n = self.split(site), self.nblocks
        require(
            bool(split) or not self.match_strict,
            f"{self.label} on {site.quoted}: expected its name in blocks_a or blocks_b, found it "
            "in neither; add it, or give match_strict=False",
        )
        size = site.in_features if split == "A" else site.out_features
        require(
            not split or size % n == 0,
            f"{self.label} on {site.quoted}: expected nblocks that divides {size}, got {n}",
        )

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
