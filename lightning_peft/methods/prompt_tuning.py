"""PromptTuning: n trained embeddings before the text, [P; emb(x)], or added to it.

Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2.
The start from text is its "class label" start, as in Hugging Face peft 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFEntry, HFFormat, SequenceMethod
from lightning_peft.methods.checks import require
from lightning_peft.methods.prompt_exchange import (
    model_config,
    sequence_site,
    unpack_prompt,
)
from lightning_peft.methods.registry import register

__all__ = ["PromptTuning"]


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    site = sequence_site(entries)
    config.update(model_config(site, site.width))


def _refuse(method: PromptTuning, site: SequenceSite) -> str:
    if method.mode == "add":
        return "peft has no prompts that are added"
    return "" if site.embedding else "a transformer of your own has no equal there"


class _Table(nn.Module):
    """The trained embeddings."""

    P: nn.Parameter


@register
@dataclass(frozen=True)
class PromptTuning(SequenceMethod):
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

    hf: ClassVar[HFFormat | None] = HFFormat(
        peft_type="PROMPT_TUNING",
        tensors={},
        prefix={"P": "prompt_embeddings"},
        config={"n": "num_virtual_tokens"},
        fixed={"prompt_tuning_init": "RANDOM"},
        ignored=(
            *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
            *("tokenizer_kwargs", "token_dim", "num_layers", "num_attention_heads"),
            "num_transformer_submodules",
        ),
        saved_prefix="base_model.",
        unpack=unpack_prompt,
        to_config=_to_config,
        refuse=_refuse,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self.n >= 1, f"{self.label}: expected n >= 1, got n = {self.n}")
        require(
            self.mode in ("prepend", "add"),
            f"{self.label}: expected mode 'prepend' or 'add', got {self.mode!r}",
        )
        require(
            self.init in ("vocab", "random", "text"),
            f"{self.label}: expected init 'vocab', 'random' or 'text', got {self.init!r}",
        )
        require(
            isinstance(self.init_ids, Sequence),
            f"{self.label}: expected init_ids in the order of the text, got {self.init_ids!r}; "
            "give a list",
        )
        require(
            (self.init == "text") == bool(self.init_ids),
            f"{self.label}: expected init_ids with init='text' and only then, got "
            f"init={self.init!r} and {len(self.init_ids)} ids; tokenise the text with your "
            "tokenizer, or use PromptTuning.from_text",
        )

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, **fields: Any) -> PromptTuning:
        """A prompt that starts from a text; n is its length unless given."""
        ids = [int(i) for i in tokenizer(text)["input_ids"]]
        return cls(init="text", init_ids=ids, **{"n": len(ids), **fields})

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
