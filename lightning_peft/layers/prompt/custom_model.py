"""Prompts in a transformer of the user's own, by the name of the module that gives embeddings.

That module's output [B, L, width] gets the prompt in front, so everything behind it sees n more
positions; masks of `nn.MultiheadAttention` are widened where they are short, and the positions are
taken off the model's output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from lightning_peft.layers.prompt.adapter import PromptAdapter

__all__ = ["CustomModelHooks"]


class CustomModelHooks:
    """Hooks that a prompt needs outside its own module."""

    def __init__(self, adapter: PromptAdapter, root: nn.Module) -> None:
        self.adapter = adapter
        self.handles = [root.register_forward_hook(self.strip)]
        for module in root.modules():
            if isinstance(module, nn.MultiheadAttention):
                self.handles.append(module.register_forward_pre_hook(widen, with_kwargs=True))

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()

    def strip(self, module: nn.Module, args: object, output: Any) -> Any:
        """Take the prompt's positions off the first tensor of the output, where it has them."""
        state = self.adapter.state
        n, length = state.prompt_lengths.take()  # another prompt's hook comes behind this one
        first = output[0] if isinstance(output, tuple) else output
        if not n or not isinstance(first, Tensor) or first.dim() < 2:
            return output
        if first.shape[1] != n + length:
            return output
        short = first[:, n:]
        return (short, *output[1:]) if isinstance(output, tuple) else short


def widen(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Make masks that are short as long as the keys: what is added stands in front, and is seen."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    length = call["key"].shape[1 if module.batch_first else 0]
    padding, mask = call.get("key_padding_mask"), call.get("attn_mask")
    if padding is not None and padding.shape[-1] < length:
        call["key_padding_mask"] = _padded(padding, length - padding.shape[-1])
    if mask is not None and mask.shape[-1] < length:
        n = length - mask.shape[-1]
        wide = _padded(mask, n)
        # The prompt sees itself alone; masks say what is not seen by True or -inf.
        above = torch.zeros_like(wide[..., :n, :])
        above[..., n:] = True if mask.dtype == torch.bool else float("-inf")
        call["is_causal"] = False  # a hint that would stand for another mask
        call["attn_mask"] = torch.cat([above, wide], dim=-2)
    return (), call


def _padded(mask: Tensor, n: int) -> Tensor:
    return F.pad(mask, (n, 0), value=False if mask.dtype == torch.bool else 0.0)
