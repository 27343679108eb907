"""PromptTuning: n trained embeddings before the text, [P; emb(x)], or added to it.

Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.
The start from text is its "class label" start, as in Hugging Face peft 0.21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFFormat, SequenceMethod
from lightning_peft.methods.checks import require, require_ordered
from lightning_peft.methods.formats.prompt_tuning import FORMAT
from lightning_peft.methods.limits import COUNT
from lightning_peft.methods.registry import register
from lightning_peft.methods.text_start import TextStart

__all__ = ["PromptTuning"]


class _Table(nn.Module):
    """The trained embeddings."""

    P: nn.Parameter


@register
@dataclass(frozen=True)
class PromptTuning(TextStart, SequenceMethod):
    """Soft prompt. The output keeps the text's length: positions of the prompt are taken off, and
    with them the prediction of the text's first token, which peft counts in its loss.

    In a transformer of your own `target_modules` names the module whose output [B, L, width] is the
    embeddings, positions included.

    Attributes:
        n: Number of virtual tokens.
        mode: ``"prepend"``, or ``"add"``: embedding i of the text plus P[min(i, n − 1)].
        init: ``"vocab"``: embeddings of random tokens. ``"random"``: normal, with the embeddings'
            standard deviation (0 for ``"add"``). ``"text"``: embeddings of `init_ids`.
        init_ids: Tokens of a text, repeated or cut to n.
    """

    n: int = 20
    mode: Literal["prepend", "add"] = "prepend"
    init: Literal["vocab", "random", "text"] = "vocab"
    init_ids: tuple[int, ...] | list[int] = ()

    limits = {"n": COUNT}
    hf: ClassVar[HFFormat | None] = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require_ordered(self, "init_ids")
        require(
            (self.init == "text") == bool(self.init_ids),
            f"{self.label}: expected init_ids with init='text' and only then, got "
            f"init={self.init!r} and {len(self.init_ids)} ids; tokenise the text with your "
            "tokenizer, or use PromptTuning.from_text",
        )

    @property
    def insertion(self) -> Literal["prepend", "add"]:
        """Before the text, or on it."""
        return self.mode

    def module(self, site: SequenceSite) -> nn.Module:
        """P [n, width], fp32."""
        made = _Table()
        made.P = nn.Parameter(self._start(site))
        return made

    def _start(self, site: SequenceSite) -> Tensor:
        if self.init == "random" or (self.init == "vocab" and self.mode == "add"):
            if self.mode == "add":  # the model starts as it is
                return torch.zeros(self.n, site.width)
            std = site.embed(torch.arange(256)).std() if site.vocabulary else 0.02
            return torch.randn(self.n, site.width) * std
        require(
            site.vocabulary > 0,
            f"{self.label} on {site.quoted}: expected an nn.Embedding to start from, got "
            f"{type(site.module).__name__}; use init='random'",
        )
        ids = torch.tensor(list(self.init_ids) or [0])
        if self.init == "vocab":
            return site.embed(torch.randint(0, site.vocabulary, (self.n,)))
        require(
            int(ids.max()) < site.vocabulary and int(ids.min()) >= 0,
            f"{self.label}: expected init_ids below the vocabulary's size {site.vocabulary}, got "
            f"{int(ids.max())}",
        )
        return site.embed(ids.repeat(-(-self.n // len(ids)))[: self.n])

    def prompt_embeddings(self, module: nn.Module, site: SequenceSite) -> Tensor:
        """P."""
        return cast(_Table, module).P

    def load_prompt_embeddings(self, module: nn.Module, table: Tensor, site: SequenceSite) -> None:
        """Copy into P."""
        cast(_Table, module).P.data.copy_(table)
