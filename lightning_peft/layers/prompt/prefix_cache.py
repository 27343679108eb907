"""Trained keys and values in a transformers cache. Imported only where a prefix is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from lightning_peft.core.per_thread import exclusive

__all__ = ["PrefixCache", "preserve_cache", "unused_prefix_layers", "with_prefix"]


#: Recomputes the pairs, with a graph of their own.
Again = Callable[[], Sequence[tuple[Tensor, Tensor]]]

#: (layer, its keys) → factor of its keys and values, or None.
Factor = Callable[[int, Tensor], Tensor | None]


class PrefixCache(DynamicCache):  # type: ignore[misc]
    """A cache that holds a prefix and nothing else: reading it twice gives the same.

    Training runs a layer again in backward (activation checkpointing), and a cache that grows would
    hold the text twice.

    Attributes:
        is_read_only: Whether reading changes nothing, so that a block may run twice.
    """

    is_read_only = True

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        config: object,
        again: Again | None = None,
        factor: Factor | None = None,
    ) -> None:
        super().__init__(config=config)
        self.factor = factor
        self.read: set[int] = set()
        self.again = again
        for layer, (keys, values) in enumerate(pairs):
            super().update(keys, values, layer)
        self.count = len(pairs)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[prefix; text], nothing kept."""
        if layer_idx >= self.count:  # cross attention, or a layer without a prefix
            return key_states, value_states
        self.read.add(layer_idx)
        held = self.layers[layer_idx]
        keys, values = held.keys, held.values
        if self.again is not None:
            keys, values = self.again()[layer_idx]
        by = None if self.factor is None else self.factor(layer_idx, keys)
        if by is not None:
            keys, values = keys * by, values * by
        keys = torch.cat([keys.to(key_states.dtype), key_states], dim=-2)
        return keys, torch.cat([values.to(value_states.dtype), value_states], dim=-2)


class _Nothing(dict[int, bool]):
    """`is_updated` of a cache that keeps nothing."""

    def __setitem__(self, key: int, value: bool) -> None:
        """Forget it."""

    def get(self, key: int, default: object = None) -> Any:
        """Never updated."""
        return False


def with_prefix(
    past: Any,
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: object,
    *,
    crossed: bool,
    keep: bool,
    again: Again | None = None,
    factor: Factor | None = None,
) -> Any:
    """An empty cache (or None) with (keys, values) [B, heads, n, features] a layer in it.

    Args:
        past: The caller's cache, filled in place; None makes one.
        pairs: One per layer.
        config: Configuration of the model.
        crossed: Whether the layers have cross attention too.
        keep: Whether the cache is to grow with the text; without it the prefix alone is held.
        again: Recomputes the pairs in every layer.
        factor: Returns the factor of a layer's pair when the layer runs; for a single prefix.
    """
    if past is None and not keep:
        cache: Any = PrefixCache(pairs, config, again, factor)
        if crossed:
            cache = EncoderDecoderCache(cache, PrefixCache((), config))
            cache.is_updated = _Nothing()
        return cache
    if past is None:
        past = DynamicCache(config=config)
        if crossed:
            past = EncoderDecoderCache(past, DynamicCache(config=config))
    own = getattr(past, "self_attention_cache", past)
    for layer, (keys, values) in enumerate(pairs):
        own.update(keys, values, layer)
    return past


def unused_prefix_layers(past: Any) -> list[int]:
    """Layers that did not read the prefix that was made for them."""
    own = getattr(past, "self_attention_cache", past)
    return sorted(set(range(own.count)) - own.read) if isinstance(own, PrefixCache) else []


def needs_full_cache(module: nn.Module) -> bool:
    """Whether layers are checkpointed in the reentrant way, whose repeated forward has a graph of
    its own: what was made outside it could be backpropagated only once.
    """
    for block in _checkpointed(module):
        if getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            return True
    return False


def _checkpointed(module: nn.Module) -> list[nn.Module]:
    return [
        m
        for m in module.modules()
        if m is not module
        and m.training
        and getattr(m, "gradient_checkpointing", False)
        and hasattr(m, "_gradient_checkpointing_func")
    ]


@contextmanager
def preserve_cache(module: nn.Module) -> Iterator[None]:
    """Have checkpointed layers keep the cache that they would drop: ours is only read.

    Raises:
        RuntimeError: a release of transformers whose layers cannot keep it.
    """
    blocks = _checkpointed(module)
    if blocks and not any(hasattr(m, "_can_checkpoint_with_cache") for m in blocks):
        raise RuntimeError(
            "PrefixTuning with gradient checkpointing: expected a release of transformers whose "
            "checkpointed layers can keep a cache (5.20 or later), found one that drops it; update "
            "it, or turn checkpointing off"
        )
    flag = getattr(module, "gradient_checkpointing", None)
    with exclusive(module) if blocks else nullcontext():
        for block in blocks:
            vars(block)["_can_checkpoint_with_cache"] = True
        if blocks and flag:  # GPT-2's stack drops the cache itself; its blocks do the checkpointing
            vars(module)["gradient_checkpointing"] = False
        try:
            yield
        finally:
            if blocks and flag:
                vars(module)["gradient_checkpointing"] = flag
            for block in blocks:
                vars(block).pop("_can_checkpoint_with_cache", None)
