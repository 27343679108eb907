"""Planned adapters: each kind of placement, with its site resolved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.core.site import BlockSite, RouterSite, SequenceSite, Site
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.attention_prompt import AttentionPromptAdapter
from lightning_peft.layers.block import BlockAdapter, InputTap
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.layers.prompt.adapter import PromptAdapter, PromptHooks
from lightning_peft.layers.router_adapter import RouterAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import (
    BlockMethod,
    Method,
    RouterMethod,
    SelectMethod,
    SequenceMethod,
    WeightMethod,
)

__all__ = [
    "AttentionPlacement",
    "BlockPlacement",
    "CopyPlacement",
    "Placement",
    "PlannedAdapter",
    "PromptPlacement",
    "RouterPlacement",
    "WeightPlacement",
]


@dataclass
class Placement(ABC):
    """One place in a model that gets an adapter.

    Attributes:
        site: The place, with layer ops and storage bound.
        slot: Key among several adapters of one name on one module; "" for a single one.
    """

    site: Site
    slot: str = ""

    @property
    def name(self) -> str:
        """Fully qualified name of the module."""
        return self.site.name

    @property
    def module(self) -> nn.Module:
        """The module whose class will be swapped."""
        return self.site.module

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the parameters that get a trained copy; empty for the other kinds."""
        return ()

    @abstractmethod
    def build(self, method: Any, adapter_name: str, copies: dict[int, nn.Parameter]) -> Adapter:
        """The adapter with its initial values.

        Args:
            method: The method, of the kind that the placement was found for.
            adapter_name: Name to attach under.
            copies: Trained copies made so far by id of the original; extended in place.
        """


@dataclass
class WeightPlacement(Placement):
    """A weight that gets an edit."""

    def build(
        self, method: WeightMethod, adapter_name: str, copies: dict[int, nn.Parameter]
    ) -> WeightAdapter:
        """An adapter of the weight."""
        return WeightAdapter.build(method, self.site, adapter_name)


@dataclass
class BlockPlacement(Placement):
    """A layer that gets an added module.

    Attributes:
        tap: The module whose input the added module reads; None for the layer's own input.
    """

    site: BlockSite
    tap: nn.Module | None = None

    def build(
        self, method: BlockMethod, adapter_name: str, copies: dict[int, nn.Parameter]
    ) -> BlockAdapter:
        """An added module, with its tap."""
        adapter = BlockAdapter(method, self.site, adapter_name)
        if self.tap is not None:
            adapter.tap = InputTap(adapter, self.tap)
        return adapter


@dataclass
class AttentionPlacement(BlockPlacement):
    """A self-attention module that gets further positions with a softmax of their own."""

    def build(
        self, method: BlockMethod, adapter_name: str, copies: dict[int, nn.Parameter]
    ) -> BlockAdapter:
        """The positions, with the hook that keeps the queries."""
        return AttentionPromptAdapter(method, self.site, adapter_name)


@dataclass
class PromptPlacement(Placement):
    """A module that gets further positions.

    Attributes:
        hook: Adds the hooks that the prompt needs on other modules; None if it needs none.
    """

    site: SequenceSite
    hook: Callable[[PromptAdapter], PromptHooks] | None = None

    def build(
        self, method: SequenceMethod, adapter_name: str, copies: dict[int, nn.Parameter]
    ) -> PromptAdapter:
        """A prompt, with its hooks."""
        adapter = PromptAdapter(method, self.site, adapter_name)
        if self.hook is not None:
            adapter.hooks = self.hook(adapter)
        return adapter


@dataclass
class RouterPlacement(Placement):
    """A model that gets a router of the adapters inside it."""

    site: RouterSite

    def build(
        self, method: RouterMethod, adapter_name: str, copies: dict[int, nn.Parameter]
    ) -> RouterAdapter:
        """The router."""
        return RouterAdapter(method, self.site, adapter_name)


@dataclass
class CopyPlacement(Placement):
    """A module some of whose parameters get a trained copy.

    Attributes:
        parameters: Paths of these parameters inside the module.
        statistics: Names of its running statistics, which are copied with them.
    """

    parameters: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the parameters that get a trained copy."""
        return self.parameters

    def build(
        self, method: SelectMethod, adapter_name: str, copies: dict[int, nn.Parameter]
    ) -> CopyAdapter:
        """Trained copies of the parameters."""
        adapter = CopyAdapter(method, self.site, adapter_name, self.parameters, copies)
        adapter.copy_statistics(self.statistics)
        return adapter


@dataclass(frozen=True)
class PlannedAdapter:
    """One adapter that attach will build.

    Attributes:
        method: The method.
        key: Key of the method in a hybrid; "" for a single method.
        placement: The place it goes to.
    """

    method: Method
    key: str
    placement: Placement
