"""aLoRA: LoRA that acts from its invocation tokens on. Greenewald et al. 2025, arXiv:2504.12397."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_peft.core.activated import Activated
from lightning_peft.core.edit import Edit
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank
from lightning_peft.methods.checks import require
from lightning_peft.methods.formats.alora import FORMAT
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register

__all__ = ["ALoRA", "Activated"]


@register
@dataclass(frozen=True)
class ALoRA(LoRA):
    """LoRA at the positions from the last start of `invocation_tokens` in each row on.

    Before them the output is the base's, so that the base's KV cache is reused up to there. A row
    without the tokens runs as the base. It has no merged form.

    Attributes:
        r, alpha, dropout, …: As for LoRA.
        invocation_tokens: Ids, as the tokenizer gives them for the invocation text.

    Raises:
        ValueError: as LoRA; no tokens; lora_bias, freeze_A, or a start that changes the base.
    """

    invocation_tokens: list[int] = field(default_factory=list)

    mergeable: ClassVar[bool] = False

    hf = FORMAT

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        tokens = self.invocation_tokens
        require(
            isinstance(tokens, Sequence)
            and bool(tokens)
            and all(type(t) is int and t >= 0 for t in tokens),
            f"{self.label}: expected a list invocation_tokens with ids >= 0, got {tokens}; take "
            "them from tokenizer.encode(text, add_special_tokens=False)",
        )
        require(
            not (self.lora_bias or self.freeze_A or self.rewrites_base or self.needs_data),
            f"{self.label}: expected lora_bias=False, freeze_A=False and a start that leaves the "
            f"base alone, got lora_bias={self.lora_bias}, freeze_A={self.freeze_A}, "
            f"init={self.init!r}",
        )

    @property
    def reads_batch(self) -> bool:
        """Return True: the tokens on which it acts depend on the batch."""
        return True

    @property
    def reads_tokens(self) -> bool:
        """Return True: the tokens on which it acts follow from their ids."""
        return True

    def check(self, site: Site) -> None:
        """A layer that runs token by token."""
        super().check(site)
        require(
            site.ops.features_last and not site.batch_shape and not site.is_embedding,
            f"{self.label} on {site.quoted}: expected a linear layer, got "
            f"{type(site.module).__name__}; exclude it or use LoRA there",
        )

    def batch_facts(self, ids: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """on [batch, positions]; and for the next step with a cache: which rows are active, and the
        last ids, in which the tokens may have begun.
        """
        batch, n = ids.shape[0], len(self.invocation_tokens)
        tail = before.get("tail", ids.new_empty(batch, 0))
        active = before.get("active", ids.new_zeros(batch, dtype=torch.bool))
        require(
            len(active) == batch,
            f"{self.label}: expected the rows of the batch that filled the cache, {len(active)}, "
            f"got {batch}",
        )
        seen = torch.cat((tail, ids), dim=1)
        at = torch.arange(seen.shape[1], device=ids.device)
        begins = ids.new_zeros(seen.shape, dtype=torch.bool)
        if seen.shape[1] >= n:
            width = seen.shape[1] - n + 1
            hits = seen[:, :width] == self.invocation_tokens[0]
            for i, token in enumerate(self.invocation_tokens[1:], 1):
                hits &= seen[:, i : i + width] == token
            begins[:, :width] = hits
        last = torch.where(begins, at, -1).amax(dim=1)
        start = torch.where(last >= 0, last, torch.where(active, 0, seen.shape[1]))
        on = (at >= start.unsqueeze(1))[:, tail.shape[1] :]
        keep = seen[:, max(0, seen.shape[1] - n + 1) :]
        return {"on": on, "active": active | (last >= 0), "tail": keep}

    def edit(self, p: Mapping[str, Tensor], site: Site) -> Edit:
        """LoRA's change where it acts."""
        (term,) = super().edit(p, site).terms
        assert isinstance(term, LowRank)
        return Edit(terms=(Activated(term, p.get("on")),), dropout=self.dropout)
