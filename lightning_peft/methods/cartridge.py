"""Cartridge: the keys and values of a text, trained on. Eyuboglu et al. 2025, arXiv:2506.06266."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.checks import require
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.registry import register

__all__ = ["Cartridge"]

_PREFIX = cast(HFFormat, PrefixTuning.hf)


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    assert _PREFIX.to_config is not None
    _PREFIX.to_config(entries, config)
    for key in ("prefix_projection", "encoder_hidden_size"):
        del config[key]


class _Cache(nn.Module):
    """F [frozen, columns], P [n − frozen, columns]."""

    F: Tensor
    P: nn.Parameter


@register
@dataclass(frozen=True)
class Cartridge(PrefixTuning):
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

    hf: ClassVar[HFFormat | None] = dataclasses.replace(
        _PREFIX,
        peft_type="CARTRIDGE",
        config={"n": "num_virtual_tokens", "frozen": "num_frozen_tokens"},
        defaults={"num_frozen_tokens": 1},
        to_config=_to_config,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(
            self.init in ("random", "zero", "text"),
            f"{self.label}: expected init 'random', 'zero' or 'text', got {self.init!r}",
        )
        require(self.n >= 1, f"{self.label}: expected n >= 1, got n = {self.n}")
        require(
            self.hidden is None or self.hidden >= 1,
            f"{self.label}: expected hidden >= 1, got hidden = {self.hidden}",
        )
        require(
            0 <= self.frozen < self.n,
            f"{self.label}: expected 0 <= frozen < n = {self.n}, got frozen = {self.frozen}",
        )
        require(
            isinstance(self.init_ids, Sequence),
            f"{self.label}: expected init_ids in the order of the text, got {self.init_ids!r}; "
            "give a list",
        )
        require(
            len(self.init_ids) >= self.n if self.init == "text" else not self.init_ids,
            f"{self.label}: expected {self.n} init_ids or more with init='text' and only then, "
            f"got init={self.init!r} and {len(self.init_ids)} ids; use Cartridge.from_text",
        )
        require(
            not (self.projection or self.gating),
            f"{self.label}: expected projection=False and gating=False, got {self.projection}, "
            f"{self.gating}",
        )

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, **fields: Any) -> Cartridge:
        """Keys and values of a text; n is its length unless given."""
        ids = [int(i) for i in tokenizer(text)["input_ids"]]
        return cls(init="text", init_ids=ids, **{"n": len(ids), **fields})

    def module(self, site: SequenceSite) -> nn.Module:
        """F and P; F is kept and saved, not trained."""
        made = _Cache()
        table = torch.zeros(self.n, self.columns(site))
        if self.init == "random":
            table.normal_()
        elif self.init == "text":
            table = self._cache_of_text(site)
        made.register_buffer("F", table[: self.frozen].clone())
        made.P = nn.Parameter(table[self.frozen :].clone())
        return made

    @torch.no_grad()
    def _cache_of_text(self, site: SequenceSite) -> Tensor:
        """[n, columns]: what the stack puts into its cache for the text."""
        stack: Any = site.module
        require(
            bool(site.embedding) and not site.embeddings.weight.is_meta,
            f"{self.label} on {site.quoted}: expected a decoder of Hugging Face with its weights "
            "to run the text through, got none; use init='random'",
        )
        ids = torch.tensor([list(self.init_ids)[: self.n]], device=site.embeddings.weight.device)
        modes = [(m, m.training) for m in stack.modules()]
        stack.eval()
        try:
            cache = stack(input_ids=ids, use_cache=True).past_key_values
        finally:
            for m, training in modes:
                m.training = training
        pairs = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
        require(
            len(pairs) == len(site.layers),
            f"{self.label} on {site.quoted}: expected keys and values of {len(site.layers)} "
            f"layers, got {len(pairs)}; use init='random'",
        )
        rows = [t[0].transpose(0, 1).reshape(self.n, -1) for pair in pairs for t in pair]
        return torch.cat(rows, dim=1).float().cpu()

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """[n, columns]."""
        made = cast(_Cache, module)
        return torch.cat([made.F.to(made.P.dtype), made.P])

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Copy into F and P."""
        made = cast(_Cache, module)
        made.F.copy_(table[: self.frozen])
        made.P.data.copy_(table[self.frozen :])
