"""Token ids of a trained hard prompt."""

from __future__ import annotations

from torch import nn

from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.methods.hard_prompt import HardPrompt

__all__ = ["hard_prompt_ids"]


def hard_prompt_ids(model: nn.Module, adapter_name: str = "default") -> list[int]:
    """Token ids of a `HardPrompt`, for ``tokenizer.decode``.

    Raises:
        KeyError: no hard prompt of that name.
    """
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module, adapter_name):
            if isinstance(adapter, PromptAdapter) and isinstance(adapter.method, HardPrompt):
                ids: list[int] = adapter.method.token_ids(adapter.block, adapter.site).tolist()
                return ids
    raise KeyError(
        f"hard_prompt_ids: expected a HardPrompt attached as {adapter_name!r}, found none"
    )
