"""Added modules: how a block's output joins the output of the module it is attached to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.mixed_batch import current_mixed_batch

__all__ = ["InputTap"]


def apply_block(
    adapter: Adapter, x: Any, y: Any, again: Callable[[Tensor], Any]
) -> tuple[Any, Any]:
    """Input and output of a layer with the added module's effect, on the rows that are under it.

    A tuple output carries the hidden states first. `again` runs the layer on another input.
    """
    role = adapter.site.role  # type: ignore[attr-defined]
    hidden = y[0] if isinstance(y, tuple) else y
    if role == "beside":
        read = x if adapter.tap is None else adapter.tap.take()
        if read.shape[:-1] != hidden.shape[:-1]:  # a mixture of experts puts tokens in one row
            read = read.reshape(*hidden.shape[:-1], read.shape[-1])
    else:
        read = hidden
    mix = current_mixed_batch()
    if mix is None:
        change = adapter.method.change(adapter.block, read, adapter.site).to(hidden.dtype)
    else:
        rows = mix.index(adapter.adapter_name, hidden.shape[0], hidden.device)
        part = adapter.method.change(adapter.block, read[rows], adapter.site)
        change = torch.zeros_like(hidden).index_copy(0, rows, part.to(hidden.dtype))
    if role == "norm":
        x = x + change
        return x, again(x)
    out = hidden + change
    return x, (out, *y[1:]) if isinstance(y, tuple) else out


class InputTap:
    """Keeps the input of one module for an adapter on another, within one forward of a block.

    Both run inside the same block, so that activation checkpointing repeats both.
    """

    def __init__(self, adapter: Adapter, module: nn.Module) -> None:
        self.adapter = adapter
        self.seen: Tensor | None = None
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: keep the input while the adapter acts."""
        state: Any = self.adapter.site.module._peft
        if self.adapter in state.blocks:
            self.seen = args[0] if args else next(iter(kwargs.values()))

    def take(self) -> Tensor:
        """The input that was kept, once.

        Raises:
            RuntimeError: the tapped module did not run before the adapter's.
        """
        x, self.seen = self.seen, None
        if x is None:
            raise RuntimeError(
                f"{self.adapter.site.label}: expected the module that leads into the feed-forward "
                "branch to run before it, found that it did not; name the modules in "
                "target_modules"
            )
        return x
