"""Forward of a model with further positions: prompts before the text, on it, or in attention.

The boundary is the stack that consumes the embeddings (`LlamaModel`, `BertModel`, the encoder of
T5). Prompts are put before the embeddings there, mask, positions and token types follow, and the
prompt's positions are taken off the output: the head, labels and generation outside see the length
of the text. While generating the cache holds the prompt; later steps only see a longer mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.layers.mixed_batch import MixedBatch, current_mixed_batch
from lightning_peft.layers.prompt.gating import gated, refuse_rows
from lightning_peft.layers.prompt.multihead_attention import attend, batch_of

__all__ = ["forward_names", "forward_with_prompt", "prompt_of", "require_flat"]

#: Model types whose positions are relative, or follow from the mask: rows may differ in length.
_RELATIVE = frozenset({"bloom", "mpt", "t5", "mt5", "umt5", "longt5", "opt"})


_NAMES: dict[Any, tuple[str, ...]] = {}


def forward_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of a class's forward, without self; looked up once a class."""
    if cls not in _NAMES:
        _NAMES[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _NAMES[cls]


@dataclass
class Prompt:
    """Positions before the text.

    Attributes:
        values: [B, n, features].
        mask: [B, n] of 0 and 1; None where every row has all of them.
    """

    values: Tensor
    mask: Tensor | None

    @property
    def n(self) -> int:
        """Positions of the longest row."""
        return self.values.shape[1]

    def ones(self, like: Tensor) -> Tensor:
        """The mask, in the dtype and on the device of another."""
        if self.mask is None:
            return like.new_ones(self.values.shape[:2])
        return self.mask.to(like)

    def counts(self) -> int | Tensor:
        """Positions of each row: n, or [B, 1]."""
        return self.n if self.mask is None else self.mask.sum(dim=1, keepdim=True)


def prompt_of(adapters: Sequence[Any], batch: int, device: torch.device) -> Prompt | None:
    """The positions of every row; the adapter named last stands outermost, so first."""
    if not adapters:
        return None
    mix = current_mixed_batch()
    tables = {id(a): a.method.table(a.block, a.site).to(device) for a in adapters}
    if mix is None:
        whole = torch.cat([tables[id(a)] for a in reversed(adapters)])
        return Prompt(whole.expand(batch, -1, -1), None)
    return _mixed_front(adapters, tables, mix, batch, device)


def _mixed_front(
    adapters: Sequence[Any],
    tables: Mapping[int, Tensor],
    mix: MixedBatch,
    batch: int,
    device: torch.device,
) -> Prompt | None:
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(mix.names):
        own = [tables[id(a)] for a in reversed(adapters) if a.adapter_name == name]
        if own:
            found[name] = torch.cat(own)
    if not found:
        return None
    n = max(t.shape[0] for t in found.values())
    like = next(iter(found.values()))
    values = like.new_zeros(batch, n, like.shape[1])
    mask = torch.zeros(batch, n, dtype=torch.int64, device=device)
    for name, table in found.items():
        rows = mix.index(name, batch, device)
        short = n - table.shape[0]
        padded = torch.cat([table.new_zeros(short, table.shape[1]), table])
        values = values.index_copy(0, rows, padded.expand(len(rows), -1, -1))
        mask[rows, short:] = 1
    return Prompt(values, None if bool(mask.all()) else mask)


def forward_with_prompt(
    module: nn.Module,
    adapters: Sequence[Any],
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The stack's own forward with every adapter's positions.

    Raises:
        ValueError: a mask with more than two axes, or rows of different length where the model's
            positions cannot follow.
    """
    names = forward_names(base_class(module))
    if isinstance(module, nn.MultiheadAttention):
        return _in_attention(module, adapters, {**dict(zip(names, args, strict=False)), **kwargs})
    if not adapters[0].site.embedding:
        return _put_before_own(module, adapters, run(*args, **kwargs))
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    text = ids if embeds is None else embeds
    if text is None:
        return run(*args, **kwargs)
    batch, length, device = text.shape[0], text.shape[1], text.device
    past = call.get("past_key_values")
    seen = 0 if past is None else int(past.get_seq_length())
    site = adapters[0].site
    prompts = prompt_of([a for a in adapters if a.method.acts == "prepend"], batch, device)
    inside = [a for a in adapters if a.method.acts == "attention"]
    prefix = prompt_of(inside, batch, device)
    added = [a for a in adapters if a.method.acts == "add"]
    if added:
        call["inputs_embeds"] = _added(site, call, added, seen)
        call.pop("input_ids", None)
    fronts = [f for f in (prefix, prompts) if f is not None]
    if not fronts:
        return run(**call)
    if getattr(past, "is_compileable", False):
        raise ValueError(
            f"{adapters[0].method.label}: expected a cache that grows, got {type(past).__name__} "
            "of a fixed length, in which the prompt has no room; generate with a dynamic cache"
        )
    _lengthen_mask(call, fronts, length, seen)
    _shift_positions(module, names, call, fronts, prompts if seen == 0 else None, seen, length)
    if prompts is not None and seen == 0:
        _put_before(site, call, prompts)
    if prefix is not None and seen == 0:
        out = _run_with_prefix(module, inside, run, call, prefix)
    else:
        out = run(**call)
    return _strip(out, prompts.n) if prompts is not None and seen == 0 and site.strip else out


def _embeddings(site: Any, call: Mapping[str, Any]) -> Tensor:
    embeds: Tensor | None = call.get("inputs_embeds")
    return site.embeddings(call["input_ids"]) if embeds is None else embeds


def _added(site: Any, call: Mapping[str, Any], added: Sequence[Any], seen: int) -> Tensor:
    """emb(x)_i + P[min(i, n − 1)] at real tokens."""
    embeds = _embeddings(site, call)
    mask = call.get("attention_mask")
    length = embeds.shape[1]
    if mask is None:
        at = torch.arange(seen, seen + length, device=embeds.device).expand(embeds.shape[0], -1)
        real = torch.ones_like(at)
    else:
        require_flat(mask)
        at = (mask.long().cumsum(dim=1) - 1)[:, -length:].clamp(min=0)
        real = mask[:, -length:].long()
    mix = current_mixed_batch()
    for adapter in added:
        P = adapter.method.table(adapter.block, adapter.site).to(embeds.device)
        change = P[at.clamp(max=P.shape[0] - 1)] * real.unsqueeze(-1)
        if mix is not None:
            own = torch.zeros(embeds.shape[0], 1, 1, device=embeds.device)
            own[mix.index(adapter.adapter_name, embeds.shape[0], embeds.device)] = 1
            change = change * own
        embeds = embeds + change.to(embeds.dtype)
    return embeds


def require_flat(mask: Any) -> None:
    """Raise ValueError unless the mask is [batch, length]."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"{mask.dim()} axes" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask: expected [batch, length] of 0 and 1 with prompts or prefixes, got "
            f"{got}; give the mask of the tokens, and generate with a dynamic cache"
        )


def _lengthen_mask(call: dict[str, Any], fronts: Sequence[Prompt], length: int, seen: int) -> None:
    mask = call.get("attention_mask")
    if mask is None:
        if all(f.mask is None for f in fronts):
            return  # no mask: everything is real
        values = fronts[0].values
        before = seen - sum(f.n for f in fronts) if seen else 0
        mask = torch.ones(values.shape[0], before + length, dtype=torch.int64, device=values.device)
    require_flat(mask)
    call["attention_mask"] = torch.cat([*(f.ones(mask) for f in fronts), mask], dim=1)


def _shift_positions(
    module: Any,
    names: Sequence[str],
    call: dict[str, Any],
    fronts: Sequence[Prompt],
    inserted: Prompt | None,
    seen: int,
    length: int,
) -> None:
    """Text positions behind those of the front; the prompt's own where it is put in now."""
    positions = call.get("position_ids")
    uneven = any(f.mask is not None for f in fronts)
    if positions is None:
        if not uneven:
            return  # the model counts them itself, cache included
        _require_position_ids(module, names)
        if "position_ids" not in names:
            return
        before = seen - sum(f.n for f in fronts) if seen else 0
        positions = torch.arange(before, before + length, device=fronts[0].values.device)[None]
    batch = fronts[0].values.shape[0]
    if uneven and positions.shape[-2] == 1:
        positions = positions.expand(*positions.shape[:-2], batch, -1)
    moved = positions + sum(f.counts() for f in fronts)  # type: ignore[arg-type]
    if inserted is not None:
        own = torch.arange(inserted.n, device=positions.device)[None]
        if inserted.mask is not None:
            own = (inserted.mask.cumsum(dim=1) - 1).clamp(min=0)
        others = [f.counts() for f in fronts if f is not inserted]
        own = own + sum(others) if others else own  # type: ignore[arg-type]
        moved = torch.cat([own.to(moved).expand(*moved.shape[:-1], -1), moved], dim=-1)
    call["position_ids"] = moved


def _require_position_ids(module: Any, names: Sequence[str]) -> None:
    model_type = getattr(getattr(module, "config", None), "model_type", "")
    first = getattr(module, "pooler", None) is not None  # a head that reads position 0
    if model_type in _RELATIVE or ("position_ids" in names and not first):
        return
    raise ValueError(
        f"adapter_names: expected prompts of one length on {type(module).__name__}, whose "
        "positions cannot be shifted row by row, got different ones (a row under '__base__' has "
        "length 0); run the adapters one after the other with set_adapter"
    )


def _put_before(site: Any, call: dict[str, Any], prompts: Prompt) -> None:
    embeds = _embeddings(site, call)
    call.pop("input_ids", None)
    call["inputs_embeds"] = torch.cat([prompts.values.to(embeds.dtype), embeds], dim=1)
    types = call.get("token_type_ids")
    if types is not None:
        zeros = types.new_zeros(types.shape[0], prompts.n)
        call["token_type_ids"] = torch.cat([zeros, types], dim=1)


def _put_before_own(module: Any, adapters: Sequence[Any], embeds: Tensor) -> Tensor:
    """[P; embeddings] of a module of the user's; see `sequence_own`."""
    front = prompt_of(adapters, embeds.shape[0], embeds.device)
    if front is not None and front.mask is not None:
        raise ValueError(
            f"adapter_names: expected prompts of one length in a model of your own, got different "
            f"ones on {adapters[0].site.label!r}; run the adapters one after the other"
        )
    n = 0 if front is None else front.n
    module._peft.prompt_lengths = (n, embeds.shape[1])
    return embeds if front is None else torch.cat([front.values.to(embeds.dtype), embeds], dim=1)


def _in_attention(module: Any, adapters: Sequence[Any], call: dict[str, Any]) -> Any:
    query = call["query"]
    refuse_rows(adapters)
    prefix = prompt_of(adapters, batch_of(module, query), query.device)
    if prefix is None:
        n = query.new_zeros(batch_of(module, query), 0, 2 * module.embed_dim)
        return attend(module, call, n, None)
    if any(a.method.gating for a in adapters):
        prefix.values = prefix.values * _own_gates(module, adapters, query)
    return attend(module, call, prefix.values, prefix.mask)


def _own_gates(module: Any, adapters: Sequence[Any], query: Tensor) -> Tensor:
    """Factors [B, n, 1] in one `nn.MultiheadAttention`."""
    x = query.unsqueeze(0) if query.dim() == 2 else query
    x = x if module.batch_first or query.dim() == 2 else x.transpose(0, 1)
    parts = []
    for adapter in reversed(adapters):
        gate = x.new_ones(x.shape[0], 1)
        if adapter.method.gating:
            gate = adapter.method.gate(adapter.block, 0, x)
        parts.append(gate.expand(-1, adapter.method.n))
    return torch.cat(parts, dim=1).unsqueeze(-1)


def _run_with_prefix(
    module: Any,
    adapters: Sequence[Any],
    run: Callable[..., Any],
    call: dict[str, Any],
    prefix: Prompt,
) -> Any:
    from lightning_peft.layers.prompt.prefix_cache import (
        needs_full_cache,
        preserve_cache,
        unused_prefix_layers,
        with_prefix,
    )

    refuse_rows(adapters)
    site = adapters[0].site
    past, config = call.get("past_key_values"), module.config
    wanted = call.get("use_cache")
    wanted = getattr(config, "use_cache", False) if wanted is None else wanted
    keep = past is not None or not (module.training and torch.is_grad_enabled())
    again = None
    if not keep and needs_full_cache(module):

        def again() -> list[tuple[Tensor, Tensor]]:
            front = prompt_of(adapters, prefix.values.shape[0], prefix.values.device)
            assert front is not None
            return _pairs(site, front.values)

    filled = with_prefix(
        past,
        _pairs(site, prefix.values),
        config,
        crossed=bool(getattr(config, "is_encoder_decoder", False)),
        keep=keep,
        again=again,
        factor=partial(gated, adapters),
    )
    if keep:
        _gate_cache(adapters, filled)
    call["past_key_values"] = filled
    if not keep and "use_cache" in forward_names(base_class(module)):
        call["use_cache"] = False
    with nullcontext() if keep else preserve_cache(module):
        out = run(**call)
    for adapter in adapters:
        if adapter.tap is not None:
            adapter.tap.rest()
    missing = unused_prefix_layers(filled)
    if missing:
        raise RuntimeError(
            f"PrefixTuning on {type(module).__name__}: expected every attention layer to read the "
            f"cache, found that {missing} did not; turn gradient checkpointing off, or use "
            "PromptTuning"
        )
    if past is None and not (keep and wanted) and getattr(out, "past_key_values", None) is not None:
        out.past_key_values = None  # the caller asked for none, and would count its tokens twice
    return out


def _gate_cache(adapters: Sequence[Any], filled: Any) -> None:
    """Have gates multiply what stands in a growing cache, as each layer runs."""
    start = 0
    for adapter in reversed(adapters):
        if adapter.tap is not None:
            adapter.tap.cached = getattr(filled, "self_attention_cache", filled)
            adapter.tap.span = (start, start + adapter.method.n)
        start += adapter.method.n


def _pairs(site: Any, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) [B, heads, n, features] of every layer, in the model's dtype."""
    values = values.to(site.embeddings.weight.dtype)
    batch, n, _ = values.shape
    pairs, at = [], 0
    for heads, features in site.layers:
        size = heads * features
        part = values[..., at : at + 2 * size].view(batch, n, 2, heads, features)
        keys, contents = part.permute(2, 0, 3, 1, 4)
        pairs.append((keys, contents))
        at += 2 * size
    return pairs


def _strip(out: Any, n: int) -> Any:
    """The output without the first n positions."""
    if isinstance(out, Tensor):
        return out[:, n:]
    if isinstance(out, tuple):
        return (out[0][:, n:], *out[1:])
    if getattr(out, "last_hidden_state", None) is not None:
        out.last_hidden_state = out.last_hidden_state[:, n:]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(h[:, n:] for h in out.hidden_states)
    return out
