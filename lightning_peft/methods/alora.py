"""aLoRA: LoRA that acts from its invocation tokens on. Greenewald et al. 2025, arXiv:2504.12397."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.core.edit import Edit
from lightning_peft.core.protocols import LayerOps
from lightning_peft.core.site import Site
from lightning_peft.core.terms import LowRank, NotMergeable, Term
from lightning_peft.methods import lora_exchange
from lightning_peft.methods.base import HFEntry
from lightning_peft.methods.checks import require
from lightning_peft.methods.exchange import refuse_all_but_features
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.registry import register

__all__ = ["ALoRA", "Activated"]


@dataclass(frozen=True)
class Activated(Term):
    """A low-rank change at some positions.

    Attributes:
        low_rank: The change.
        on: [batch, positions] bool; None where no batch was seen.
    """

    low_rank: LowRank
    on: Tensor | None

    def matrix(self) -> Tensor:
        """None: it depends on the position."""
        raise NotMergeable("it acts from its invocation tokens on, not on every input")

    def apply(self, ops: LayerOps, site: Site, x: Tensor) -> Tensor:
        """Two thin products; the thin activations are zero where it does not act."""
        low, on = self.low_rank, self.on
        if on is None or on.numel() != x.shape[:-1].numel():
            got = "none" if on is None else list(on.shape)
            raise RuntimeError(
                f"{site.label}: expected a forward of the whole model on input_ids, which says "
                f"where aLoRA acts, got inputs {list(x.shape)} and positions {got}"
            )
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(low.A.dtype)
        h = torch.nn.functional.linear(x, low.A) * low.scaling
        h = h * on.reshape(*x.shape[:-1], 1).to(h.dtype)
        return torch.nn.functional.linear(h, low.B)


def _require_causal(config: Mapping[str, Any]) -> None:
    """Raise where peft's wrapper does not look for the tokens, so that its aLoRA has no effect."""
    if config.get("task_type") != "CAUSAL_LM":
        raise ValueError(
            "adapter_config.json: expected task_type 'CAUSAL_LM' with alora_invocation_tokens, got "
            f"{config.get('task_type')!r}: peft's aLoRA changes nothing in models of other tasks; "
            "use LoRA there"
        )


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    _require_causal(config)
    lora_exchange.to_config(entries, config)


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    _require_causal(config)
    return lora_exchange.from_config(config, entries)


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

    hf = dataclasses.replace(
        lora_exchange.FORMAT,
        config={**lora_exchange.FORMAT.config, "invocation_tokens": "alora_invocation_tokens"},
        when={**lora_exchange.FORMAT.when, "alora_invocation_tokens": True},
        to_config=_to_config,
        from_config=_from_config,
        refuse=refuse_all_but_features,
    )

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
        wanted = torch.tensor(self.invocation_tokens, device=ids.device)
        at = torch.arange(seen.shape[1], device=ids.device)
        begins = ids.new_zeros(seen.shape, dtype=torch.bool)
        if seen.shape[1] >= n:
            hits = (seen.unfold(1, n, 1) == wanted).all(-1)
            begins[:, : hits.shape[1]] = hits
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
