"""Adapters that add positions to the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lightning_peft.core.site import SequenceSite
from lightning_peft.layers.adapted_state import ActiveAdapters
from lightning_peft.layers.adapter import ModuleAdapter
from lightning_peft.layers.mixed_batch import current_facts

if TYPE_CHECKING:
    from lightning_peft.methods.base import SequenceMethod

__all__ = ["PromptAdapter", "PromptHooks"]


class PromptHooks(Protocol):
    """Hooks that a prompt needs outside the module it is attached to."""

    def remove(self) -> None:
        """Remove all hooks."""
        ...


class PromptAdapter(ModuleAdapter):
    """Adds positions to the sequence.

    Attributes:
        hooks: Hooks on other modules; None if the prompt needs none.
    """

    method: SequenceMethod
    site: SequenceSite
    hooks: PromptHooks | None

    def __init__(self, method: SequenceMethod, site: SequenceSite, adapter_name: str) -> None:
        super().__init__(method, site, adapter_name)
        self.hooks = None

    def prompt_embeddings(self) -> Tensor:
        """The positions: [n, width], or [n, keys and values of all layers]."""
        return self.method.prompt_embeddings(self.block, self.site)

    def prompts(self, batch: int) -> Tensor:
        """The positions of a batch of rows: `prompt_embeddings`, or [batch, n, width]."""
        return self.method.prompts(self.block, self.site, current_facts(), batch)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the method's module by the method's own names."""
        own: dict[str, Any] = {**self.block._parameters, **self.block._buffers}
        return own

    def build_module(self) -> nn.Module:
        """The method's module at this site."""
        return self.method.module(self.site)

    def activate(self, active: ActiveAdapters) -> None:
        """Act as further positions."""
        active.prompts.append(self)

    def why_not_mergeable(self) -> str:
        """Added positions have no equal weight."""
        return "it adds positions, it does not change weights"

    @property
    def has_hooks(self) -> bool:
        """Whether the prompt needs hooks on other modules."""
        return self.hooks is not None

    def remove_hooks(self) -> None:
        """Remove the hooks on other modules."""
        if self.hooks is not None:
            self.hooks.remove()
