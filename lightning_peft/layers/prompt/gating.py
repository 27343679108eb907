"""Factors of a prefix's keys and values by layer, from what each attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.per_thread import PerThread
from lightning_peft.layers.acting import acting_adapters
from lightning_peft.layers.mixed_batch import current_mixed_batch
from lightning_peft.layers.prompt.adapter import PromptAdapter

__all__ = [
    "PrefixGateHooks",
    "PrefixMethod",
    "gated",
    "gated_attention",
    "prefix_method",
    "refuse_rows",
]


class PrefixMethod(Protocol):
    """The part of a method that a prefix in attention reads."""

    @property
    def n(self) -> int:
        """Number of positions."""

    @property
    def gating(self) -> bool:
        """Whether layers have gates."""

    def gate(self, module: nn.Module, layer: int, x: Tensor) -> Tensor:
        """Compute the factor [B, 1] of a layer's keys and values."""


def prefix_method(adapter: PromptAdapter) -> PrefixMethod:
    """Return the method of an adapter that acts in attention."""
    return cast(PrefixMethod, adapter.method)


def gated_attention(stack: nn.Module, layers: int) -> list[nn.Module]:
    """The self-attention module of every layer.

    Raises:
        ValueError: they are not numbered as expected.
    """
    found: dict[int, nn.Module] = {}
    for module in stack.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and "attention" in type(module).__name__.lower():
            found.setdefault(number, module)  # self-attention stands before cross-attention
    if sorted(found) != list(range(layers)):
        raise ValueError(
            f"PrefixTuning with gating: expected {layers} attention modules with a layer_idx in "
            f"{type(stack).__name__}, found those of layers {sorted(found)}; use gating=False"
        )
    return [found[i] for i in range(layers)]


@dataclass
class GatedRun:
    """The forward of a gated prefix that runs in this thread.

    Attributes:
        now: Factor [B, 1] by layer.
        cached: The growing cache whose prefix is to be multiplied.
        span: Positions of the prefix in it.
    """

    now: dict[int, Tensor] = field(default_factory=dict)
    cached: Any = None
    span: tuple[int, int] = (0, 0)


class PrefixGateHooks:
    """Keeps each layer's factor [B, 1] within a forward; the hooks a gated prefix needs.

    A prefix that stands in a growing cache already is multiplied there, once, when its layer runs
    for the first time.
    """

    def __init__(self, adapter: PromptAdapter, stack: nn.Module) -> None:
        self.adapter = adapter
        self.run = PerThread(GatedRun)
        modules = gated_attention(stack, len(adapter.site.layers))
        self.handles = [
            m.register_forward_pre_hook(partial(self.see, i), with_kwargs=True)
            for i, m in enumerate(modules)
        ]

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()

    def rest(self) -> None:
        """Forget the forward that is over."""
        self.run.take()

    def see(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The hook."""
        adapter = self.adapter
        if adapter not in acting_adapters(adapter.site.module).prompts:
            return
        x = args[0] if args else kwargs["hidden_states"]
        run = self.run.get()
        run.now[layer] = prefix_method(adapter).gate(adapter.block, layer, x)
        if run.cached is not None:
            held, (start, end) = run.cached.layers[layer], run.span
            factor = torch.ones_like(held.keys[:, :1, :, :1])
            gate = run.now[layer][:, None, :, None].to(factor.dtype)
            factor[:, :, start:end] = gate.expand(-1, -1, end - start, -1)
            held.keys, held.values = held.keys * factor, held.values * factor


def refuse_rows(adapters: Sequence[PromptAdapter]) -> None:
    """Raise ValueError where gates would have to differ by adapter within a batch."""
    if current_mixed_batch() is not None and any(
        getattr(a.method, "gating", False) for a in adapters
    ):
        raise ValueError(
            "adapter_names: expected prefixes without gates, got PrefixTuning with gating=True; "
            "run the adapters one after the other with set_adapter"
        )


def gated(adapters: Sequence[PromptAdapter], layer: int, keys: Tensor) -> Tensor | None:
    """Factors [B, 1, n, 1] of a layer's prefix; None where no adapter has gates.

    Args:
        adapters: In the order named; the last stands first.
        layer: Number of the layer.
        keys: The prefix's keys [B, heads, n, features].
    """
    if not any(prefix_method(a).gating for a in adapters):
        return None
    parts = []
    for adapter in reversed(adapters):
        method, gate = prefix_method(adapter), keys.new_ones(keys.shape[0], 1)
        if method.gating:
            assert isinstance(adapter.hooks, PrefixGateHooks)
            gate = adapter.hooks.run.get().now[layer].to(keys)
        parts.append(gate.expand(-1, method.n))
    return torch.cat(parts, dim=1)[:, None, :, None]
