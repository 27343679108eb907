"""The mask of a decoder that attends to an encoder's output with a prompt in front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft.layers.acting import acting_adapters
from lightning_peft.layers.prompt.forward import require_flat
from lightning_peft.layers.prompt.prompt import prompt_of

if TYPE_CHECKING:
    from lightning_peft.layers.prompt.adapter import PromptAdapter

__all__ = ["EncoderMaskHook"]


class EncoderMaskHook:
    """A decoder's mask over an encoder's output that has become longer by a prompt."""

    def __init__(self, adapter: PromptAdapter, decoder: nn.Module) -> None:
        self.adapter = adapter
        self._handle = decoder.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook: lengthen the mask where it is shorter than what it is for."""
        hidden, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if hidden is None:
            return None
        active = acting_adapters(self.adapter.site.module)
        prompts = [a for a in active.prompts if a.method.insertion == "prepend"]
        front = prompt_of(prompts, hidden.shape[0], hidden.device)
        if front is None or (mask is None and front.mask is None):
            return None
        if mask is None:
            mask = hidden.new_ones(hidden.shape[0], hidden.shape[1] - front.n)
        require_flat(mask)
        if mask.shape[1] + front.n != hidden.shape[1]:
            return None  # an encoder's output of before, or one that another hook has seen to
        wide = torch.cat([front.ones(mask), mask], dim=1)
        return args, {**kwargs, "encoder_attention_mask": wide}

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
