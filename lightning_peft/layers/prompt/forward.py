"""Forward of a model with further positions: before the text, added to it, or in attention.

The boundary is the stack that consumes the embeddings (`LlamaModel`, `BertModel`, the encoder of
T5). There the prompt goes in front of the embeddings; mask, positions and token types follow; and
the prompt's positions are taken off the output. The head, the labels and generation see the length
of the text. While generating, the cache holds the prompt, and later steps only see a longer mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.site import SequenceSite
from lightning_peft.layers.adapted_state import state_of
from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.prompt.multihead_prefix import forward_attention
from lightning_peft.layers.prompt.prefix import forward_with_prefix
from lightning_peft.layers.prompt.prompt import Prompt, prompt_of

__all__ = ["forward_names", "forward_with_prompt", "require_flat"]

#: Model types whose positions are relative, or follow from the mask: rows may differ in length.
_RELATIVE = frozenset({"bloom", "mpt", "t5", "mt5", "umt5", "longt5", "opt"})


def forward_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the parameters of a class's forward, without self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


@dataclass
class _Call:
    """One call of a stack.

    Attributes:
        module: The stack.
        site: Where its prompts act.
        names: Names of the parameters of its forward.
        arguments: Arguments by name; changed in place.
        batch: Rows.
        length: Positions of the text in this call.
        seen: Positions in the cache, prompts included.
        device: Device of the text.
    """

    module: nn.Module
    site: SequenceSite
    names: tuple[str, ...]
    arguments: dict[str, Any]
    batch: int
    length: int
    seen: int
    device: torch.device

    def embeddings(self) -> Tensor:
        """Return the embeddings of the text."""
        embeds: Tensor | None = self.arguments.get("inputs_embeds")
        if embeds is not None:
            return embeds
        found: Tensor = self.site.embeddings(self.arguments["input_ids"])
        return found

    def set_embeddings(self, embeds: Tensor) -> None:
        """Give embeddings in place of ids."""
        self.arguments.pop("input_ids", None)
        self.arguments["inputs_embeds"] = embeds

    def text_before(self, fronts: Sequence[Prompt]) -> int:
        """Return how many positions of text the cache holds."""
        return self.seen - sum(f.n for f in fronts) if self.seen else 0


def forward_with_prompt(
    module: nn.Module,
    adapters: Sequence[PromptAdapter],
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the stack's own forward with every adapter's positions.

    Raises:
        ValueError: a mask with more than two axes, or rows of different length where the model's
            positions cannot follow.
    """
    names = forward_names(base_class(module))
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    site = adapters[0].site
    assert isinstance(site, SequenceSite)
    if isinstance(module, nn.MultiheadAttention):
        return forward_attention(module, adapters, arguments)
    if not site.embedding:
        return _prepend_in_custom_model(module, adapters, run(*args, **kwargs))
    call = _read_call(module, site, names, arguments)
    return run(*args, **kwargs) if call is None else _forward_stack(call, adapters, run)


def _read_call(
    module: nn.Module, site: SequenceSite, names: tuple[str, ...], arguments: dict[str, Any]
) -> _Call | None:
    """Return the call; None if it has no text."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    text = ids if embeds is None else embeds
    if text is None:
        return None
    past = arguments.get("past_key_values")
    seen = 0 if past is None else int(past.get_seq_length())
    batch, length = text.shape[:2]
    return _Call(module, site, names, arguments, batch, length, seen, text.device)


def _forward_stack(call: _Call, adapters: Sequence[PromptAdapter], run: Callable[..., Any]) -> Any:
    """Prepare the arguments, run the stack, take the prompt off its output.

    Prompts and prefixes enter with the first positions; later the cache holds them.
    """
    added, prepended, inside = (
        [a for a in adapters if a.method.insertion == way]
        for way in ("add", "prepend", "attention")
    )
    prompt = prompt_of(prepended, call.batch, call.device)
    prefix = prompt_of(inside, call.batch, call.device)
    if added:
        call.set_embeddings(_added_embeddings(call, added))
    fronts = [f for f in (prefix, prompt) if f is not None]
    if not fronts:
        return run(**call.arguments)
    _check_cache_grows(call, adapters)
    _lengthen_mask(call, fronts)
    if call.seen:
        _shift_positions(call, fronts, None)
        return run(**call.arguments)
    _shift_positions(call, fronts, prompt)
    if prompt is not None:
        _prepend(call, prompt)
    if prefix is None:
        out = run(**call.arguments)
    else:
        out = forward_with_prefix(call.module, inside, run, call.arguments, prefix, call.names)
    if prompt is None or not call.site.strip:
        return out
    kept = any(a.method.keeps_positions for a in prepended)
    return out if kept else _strip(out, prompt.n)


def _check_cache_grows(call: _Call, adapters: Sequence[PromptAdapter]) -> None:
    past = call.arguments.get("past_key_values")
    if getattr(past, "is_compileable", False):
        raise ValueError(
            f"{adapters[0].method.label}: expected a cache that grows, got {type(past).__name__} "
            "of a fixed length, in which the prompt has no room; generate with a dynamic cache"
        )


def _added_embeddings(call: _Call, added: Sequence[PromptAdapter]) -> Tensor:
    """Return `emb(x)_i + P[min(i, n - 1)]` at the tokens that the mask shows."""
    embeds = call.embeddings()
    mask = call.arguments.get("attention_mask")
    if mask is None:
        at = torch.arange(call.seen, call.seen + call.length, device=embeds.device)
        at = at.expand(call.batch, -1)
        real = torch.ones_like(at)
    else:
        require_flat(mask)
        at = (mask.long().cumsum(dim=1) - 1)[:, -call.length :].clamp(min=0)
        real = mask[:, -call.length :].long()
    mix = current_mixed_batch()
    for adapter in added:
        P = adapter.prompt_embeddings().to(embeds.device)
        change = P[at.clamp(max=P.shape[0] - 1)] * real.unsqueeze(-1)
        if mix is not None:
            own = torch.zeros(call.batch, 1, 1, device=embeds.device)
            own[mix.index(adapter.adapter_name, call.batch, embeds.device)] = 1
            change = change * own
        embeds = embeds + change.to(embeds.dtype)
    return embeds


def require_flat(mask: object) -> None:
    """Raise ValueError unless the mask is [batch, length]."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"{mask.dim()} axes" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask: expected [batch, length] of 0 and 1 with prompts or prefixes, got "
            f"{got}; give the mask of the tokens, and generate with a dynamic cache"
        )


# ---- arguments that follow the prompt


def _lengthen_mask(call: _Call, fronts: Sequence[Prompt]) -> None:
    mask = call.arguments.get("attention_mask")
    if mask is None:
        if all(f.mask is None for f in fronts):
            return  # without a mask every position is real
        length = call.text_before(fronts) + call.length
        mask = torch.ones(call.batch, length, dtype=torch.int64, device=fronts[0].values.device)
    require_flat(mask)
    call.arguments["attention_mask"] = torch.cat([*(f.ones(mask) for f in fronts), mask], dim=1)


def _shift_positions(call: _Call, fronts: Sequence[Prompt], prompt: Prompt | None) -> None:
    """Move the text's positions behind the fronts; put those of a new prompt before them."""
    positions = call.arguments.get("position_ids")
    uneven = any(f.mask is not None for f in fronts)
    if prompt is not None and prompt.mask is not None and _first_position_is_read(call):
        raise _unequal_prompts(call)
    if positions is None:
        if not uneven:
            return  # the model counts them itself, cache included
        _require_position_ids(call)
        if "position_ids" not in call.names:
            return
        before = call.text_before(fronts)
        positions = torch.arange(before, before + call.length, device=fronts[0].values.device)[None]
    if uneven and positions.shape[-2] == 1:
        positions = positions.expand(*positions.shape[:-2], call.batch, -1)
    for front in fronts:
        positions = positions + front.counts()
    if prompt is not None:
        own = _positions_of_prompt(prompt, [f for f in fronts if f is not prompt])
        positions = torch.cat([own.to(positions).expand(*positions.shape[:-1], -1), positions], -1)
    call.arguments["position_ids"] = positions


def _positions_of_prompt(prompt: Prompt, others: Sequence[Prompt]) -> Tensor:
    """Return the positions of a prompt behind other fronts, [1 or B, n]."""
    own = torch.arange(prompt.n, device=prompt.values.device)[None]
    if prompt.mask is not None:
        own = (prompt.mask.cumsum(dim=1) - 1).clamp(min=0)
    for front in others:
        own = own + front.counts()
    return own


def _first_position_is_read(call: _Call) -> bool:
    """Whether a head reads the first position, where a row without a prompt has nothing."""
    if getattr(call.module, "pooler", None) is not None:
        return True
    config: Any = call.module.config
    return not call.site.strip and not config.is_encoder_decoder


def _require_position_ids(call: _Call) -> None:
    model_type = getattr(getattr(call.module, "config", None), "model_type", "")
    if model_type in _RELATIVE:
        return
    if "position_ids" not in call.names or _counts_positions_from_ids(call):
        raise _unequal_prompts(call)


def _counts_positions_from_ids(call: _Call) -> bool:
    """Whether positions begin behind a padding index, as RoBERTa's do, and depend on the ids."""
    table = getattr(getattr(call.module, "embeddings", None), "position_embeddings", None)
    return getattr(table, "padding_idx", None) is not None


def _unequal_prompts(call: _Call) -> ValueError:
    return ValueError(
        f"adapter_names: expected prompts of one length on {type(call.module).__name__}, whose "
        "positions cannot be shifted row by row, got different ones (a row under '__base__' has "
        "length 0); run the adapters one after the other with set_adapter"
    )


def _prepend(call: _Call, prompt: Prompt) -> None:
    embeds = call.embeddings()
    call.set_embeddings(torch.cat([prompt.values.to(embeds.dtype), embeds], dim=1))
    types = call.arguments.get("token_type_ids")
    if types is not None:
        zeros = types.new_zeros(types.shape[0], prompt.n)
        call.arguments["token_type_ids"] = torch.cat([zeros, types], dim=1)


# ---- other boundaries


def _prepend_in_custom_model(
    module: nn.Module, adapters: Sequence[PromptAdapter], embeds: Tensor
) -> Tensor:
    """Return [P; embeddings] in a model without a transformers config; see `custom_model`."""
    prompt = prompt_of(adapters, embeds.shape[0], embeds.device)
    if prompt is not None and prompt.mask is not None:
        raise ValueError(
            f"adapter_names: expected prompts of one length in a model of your own, got different "
            f"ones on {adapters[0].site.quoted}; run the adapters one after the other"
        )
    n = 0 if prompt is None else prompt.n
    state_of(module).prompt_lengths.set((n, embeds.shape[1]))
    return embeds if prompt is None else torch.cat([prompt.values.to(embeds.dtype), embeds], dim=1)


def _strip(out: Any, n: int) -> Any:
    """Return the output without the first n positions."""
    if isinstance(out, Tensor):
        return out[:, n:]
    if isinstance(out, tuple):
        return (out[0][:, n:], *out[1:])
    if getattr(out, "last_hidden_state", None) is not None:
        out.last_hidden_state = out.last_hidden_state[:, n:]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(h[:, n:] for h in out.hidden_states)
    return out
