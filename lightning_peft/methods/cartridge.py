"""Cartridge: the keys and values of a text, trained on. Eyuboglu et al. 2025, arXiv:2506.06266."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFFormat
from lightning_peft.methods.checks import require, require_ordered
from lightning_peft.methods.formats.cartridge import FORMAT
from lightning_peft.methods.limits import COUNT, only
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.registry import register
from lightning_peft.methods.text_start import TextStart, cache_of_text

__all__ = ["Cartridge"]


class _Cache(nn.Module):
    """F [frozen, columns], P [n − frozen, columns]."""

    F: Tensor
    P: nn.Parameter


@register
@dataclass(frozen=True)
class Cartridge(TextStart, PrefixTuning):
    """Keys and values before those of the text, in every attention layer, the first ones frozen.

    Started from a text, the model first computes as with that text in front.

    Attributes:
        n: Number of positions; with a text its length.
        frozen: Number of first positions that are not trained: early positions draw attention
            whatever they hold, and training them is unstable.
        init: ``"text"``: the model's own keys and values of `init_ids`. ``"random"``: N(0, 1), as
            peft starts. ``"zero"``.
        init_ids: Token ids of the text; its first n are used.

    Raises:
        ValueError: as PrefixTuning; frozen outside [0, n); a text without ids, or shorter than n;
            projection or gating.
    """

    init: Literal["random", "zero", "text"] = "random"  # type: ignore[assignment]
    frozen: int = 1
    init_ids: tuple[int, ...] | list[int] = ()

    limits = {
        "n": COUNT,
        "hidden": COUNT,
        "projection": only(False),
        "gating": only(False),
    }
    hf: ClassVar[HFFormat | None] = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(
            0 <= self.frozen < self.n,
            f"{self.label}: expected 0 <= frozen < n = {self.n}, got frozen = {self.frozen}",
        )
        require_ordered(self, "init_ids")
        require(
            len(self.init_ids) >= self.n if self.init == "text" else not self.init_ids,
            f"{self.label}: expected {self.n} init_ids or more with init='text' and only then, "
            f"got init={self.init!r} and {len(self.init_ids)} ids; use Cartridge.from_text",
        )

    def module(self, site: SequenceSite) -> nn.Module:
        """F and P; F is kept and saved, not trained."""
        made = _Cache()
        table = torch.zeros(self.n, self.columns(site))
        if self.init == "random":
            table.normal_()
        elif self.init == "text":
            table = cache_of_text(self.label, site, list(self.init_ids)[: self.n])
        made.register_buffer("F", table[: self.frozen].clone())
        made.P = nn.Parameter(table[self.frozen :].clone())
        return made

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """[n, columns]."""
        made = cast(_Cache, module)
        return torch.cat([made.F.to(made.P.dtype), made.P])

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Copy into F and P."""
        made = cast(_Cache, module)
        made.F.copy_(table[: self.frozen])
        made.P.data.copy_(table[self.frozen :])
