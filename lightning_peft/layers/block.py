"""Adapters that add a module: how its output joins the output of the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import first_argument
from lightning_peft.core.per_thread import PerThread
from lightning_peft.core.site import BlockSite
from lightning_peft.layers.acting import acting_adapters
from lightning_peft.layers.adapted_state import ActiveAdapters
from lightning_peft.layers.adapter import ModuleAdapter
from lightning_peft.layers.mixed_batch import current_mixed_batch

if TYPE_CHECKING:
    from lightning_peft.methods.base import BlockMethod

__all__ = ["BlockAdapter", "InputTap", "apply_block"]


class BlockAdapter(ModuleAdapter):
    """Adds a small module after a layer or parallel to it.

    Attributes:
        tap: Hook on the module whose input is read; None if the layer's own input is read.
    """

    method: BlockMethod
    site: BlockSite
    tap: InputTap | None

    def __init__(self, method: BlockMethod, site: BlockSite, adapter_name: str) -> None:
        super().__init__(method, site, adapter_name)
        self.tap = None

    def build_module(self) -> nn.Module:
        """The method's module at this site."""
        return self.method.module(self.site)

    def activate(self, active: ActiveAdapters) -> None:
        """Act as an added module."""
        active.blocks.append(self)

    def why_not_mergeable(self) -> str:
        """An added module has no equal weight."""
        return "it adds modules, it does not change weights"

    def join(
        self, x: Tensor, y: Any, again: Callable[[Tensor], Any], arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Input and output of the layer with the effect of the added module; see `apply_block`.

        Args:
            x: Input of the layer.
            y: Output of the layer.
            again: Runs the layer on another input.
            arguments: Keyword arguments of the call.
        """
        return apply_block(self, x, y, again)

    @property
    def has_hooks(self) -> bool:
        """Whether the added module reads the input of another module."""
        return self.tap is not None

    def remove_hooks(self) -> None:
        """Remove the tap."""
        if self.tap is not None:
            self.tap.remove()


def apply_block(
    adapter: BlockAdapter, x: Tensor, y: Any, again: Callable[[Tensor], Any]
) -> tuple[Tensor, Any]:
    """Input and output of a layer with the effect of an added module.

    In a mixed batch only the rows of this adapter change.

    Args:
        adapter: The added module.
        x: Input of the layer.
        y: Output of the layer; a tuple carries the hidden states first.
        again: Runs the layer on another input.
    """
    role = adapter.site.role
    hidden: Tensor = y[0] if isinstance(y, tuple) else y
    change = _change(adapter, _read(adapter, x, hidden), hidden)
    if role == "norm":
        x = x + change
        return x, again(x)
    out = hidden + change
    return x, (out, *y[1:]) if isinstance(y, tuple) else out


def _read(adapter: BlockAdapter, x: Tensor, hidden: Tensor) -> Tensor:
    """The features that the added module reads."""
    if adapter.site.role != "parallel":
        return hidden
    read = x if adapter.tap is None else adapter.tap.take()
    if read.shape[:-1] != hidden.shape[:-1]:  # a mixture of experts flattens the tokens
        read = read.reshape(*hidden.shape[:-1], read.shape[-1])
    return read


def _change(adapter: BlockAdapter, read: Tensor, hidden: Tensor) -> Tensor:
    mix = current_mixed_batch()
    if mix is None:
        return adapter.method.change(adapter.block, read, adapter.site).to(hidden.dtype)
    rows = mix.index(adapter.adapter_name, hidden.shape[0], hidden.device)
    part = adapter.method.change(adapter.block, read[rows], adapter.site)
    return torch.zeros_like(hidden).index_copy(0, rows, part.to(hidden.dtype))


def _nothing() -> None:
    return None


class InputTap:
    """Hands the input of one module to an adapter on another, within one forward of a block.

    Both modules run inside the same block, so activation checkpointing repeats both.
    """

    def __init__(self, adapter: BlockAdapter, module: nn.Module) -> None:
        self.adapter = adapter
        self.seen: PerThread[Tensor | None] = PerThread(_nothing)
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before the tapped module's forward: keep the input while the adapter acts."""
        if self.adapter in acting_adapters(self.adapter.site.module).blocks:
            self.seen.set(first_argument(args, kwargs))

    def take(self) -> Tensor:
        """The kept input, once.

        Raises:
            RuntimeError: the tapped module did not run before the adapter's module.
        """
        x = self.seen.take()
        if x is None:
            raise RuntimeError(
                f"{self.adapter.site.label}: expected the module that leads into the feed-forward "
                "branch to run before it, found that it did not; name the modules in "
                "target_modules"
            )
        return x

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
