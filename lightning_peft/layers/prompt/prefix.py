"""Forward of a stack with a prefix: keys and values in front of those of every attention layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.prompt.gating import PrefixGateHooks, gated, prefix_method, refuse_rows
from lightning_peft.layers.prompt.prompt import Prompt, prompt_of

__all__ = ["forward_with_prefix"]


def forward_with_prefix(
    module: nn.Module,
    adapters: Sequence[PromptAdapter],
    run: Callable[..., Any],
    call: dict[str, Any],
    prefix: Prompt,
    names: Sequence[str],
) -> Any:
    """Run a stack whose cache starts with the prefix.

    Args:
        module: The stack.
        adapters: Active prefix adapters, in the order named.
        run: The stack's own forward.
        call: Its arguments; the cache is replaced.
        prefix: Keys and values of all layers, side by side.
        names: Names of the parameters of the stack's forward.

    Raises:
        RuntimeError: an attention layer did not read the cache.
    """
    # transformers is optional
    from lightning_peft.layers.prompt.prefix_cache import preserve_cache, unused_prefix_layers

    refuse_rows(adapters)
    grows = _cache_grows(module, call)
    returns_cache = grows and _wants_cache(module, call)
    cache = _filled_cache(module, adapters, call, prefix, grows)
    given, call["past_key_values"] = call.get("past_key_values"), cache
    if not grows and "use_cache" in names:
        call["use_cache"] = False
    with nullcontext() if grows else preserve_cache(module):
        out = run(**call)
    for adapter in adapters:
        if isinstance(adapter.hooks, PrefixGateHooks):
            adapter.hooks.rest()
    _check_prefix_was_read(module, unused_prefix_layers(cache))
    if given is None and not returns_cache and getattr(out, "past_key_values", None) is not None:
        out.past_key_values = None  # the caller wants none, and would count its tokens twice
    return out


def _cache_grows(module: nn.Module, call: Mapping[str, Any]) -> bool:
    """Return whether the cache holds the text after the prefix: always, except in training."""
    training = module.training and torch.is_grad_enabled()
    return call.get("past_key_values") is not None or not training


def _wants_cache(module: nn.Module, call: Mapping[str, Any]) -> bool:
    wanted = call.get("use_cache")
    return bool(getattr(module.config, "use_cache", False) if wanted is None else wanted)


def _filled_cache(
    module: nn.Module,
    adapters: Sequence[PromptAdapter],
    call: Mapping[str, Any],
    prefix: Prompt,
    grows: bool,
) -> Any:
    """Return the caller's cache, or a new one, with the prefix in every layer."""
    from lightning_peft.layers.prompt.prefix_cache import needs_full_cache, with_prefix

    def pairs_again() -> list[tuple[Tensor, Tensor]]:
        values = prefix.values
        again = prompt_of(adapters, values.shape[0], values.device)
        assert again is not None
        return _keys_and_values(adapters, again.values)

    cache = with_prefix(
        call.get("past_key_values"),
        _keys_and_values(adapters, prefix.values),
        module.config,
        crossed=bool(getattr(module.config, "is_encoder_decoder", False)),
        keep=grows,
        again=pairs_again if not grows and needs_full_cache(module) else None,
        factor=partial(gated, adapters),
    )
    if grows:
        _gate_cache(adapters, cache)
    return cache


def prefix_length(adapter: PromptAdapter) -> int:
    """Number of positions that the adapter's prefix adds."""
    return prefix_method(adapter).n


def _gate_cache(adapters: Sequence[PromptAdapter], cache: Any) -> None:
    """Let gates multiply the prefix inside a growing cache, as each layer runs."""
    start = 0
    for adapter in reversed(adapters):
        gates, positions = adapter.hooks, prefix_length(adapter)
        if isinstance(gates, PrefixGateHooks):
            run = gates.run.get()
            run.cached = getattr(cache, "self_attention_cache", cache)
            run.span = (start, start + positions)
        start += positions


def _check_prefix_was_read(module: nn.Module, unused: object) -> None:
    if unused:
        raise RuntimeError(
            f"PrefixTuning on {type(module).__name__}: expected every attention layer to read the "
            f"cache, found that {unused} did not; turn gradient checkpointing off, or use "
            "PromptTuning"
        )


def _keys_and_values(
    adapters: Sequence[PromptAdapter], values: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return (keys, values) [B, heads, n, features] per layer, in the model's dtype."""
    site = adapters[0].site
    assert isinstance(site, SequenceSite)
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
