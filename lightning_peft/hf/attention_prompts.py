"""Positions in attention in a Hugging Face peft directory (``ADAPTION_PROMPT``).

peft writes `<attention>.adaption_prompt` [1, n, width] and `<attention>.adaption_gate` [1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.names import join
from lightning_peft.hf.keys import PREFIX
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.attention_prompt import AttentionPromptAdapter

__all__ = ["add_attention_prompts", "split_attention_prompts"]

_NAMES = {"adaption_prompt": "P", "adaption_gate": "g"}


def split_attention_prompts(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return (tensors by name of the attention module, the other tensors) of a file."""
    modules: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        head, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        if leaf in _NAMES and key.startswith(PREFIX):
            modules.setdefault(head, {})[_NAMES[leaf]] = tensor
        else:
            rest[key] = tensor
    return modules, rest


def add_attention_prompts(
    found: Sequence[tuple[str, nn.Module, Adapter]],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Add the positions of every attention module, and the config's names for the modules."""
    for path, _, adapter in found:
        if isinstance(adapter, AttentionPromptAdapter):
            own = adapter.tensors()
            for theirs, ours in _NAMES.items():
                tensors[PREFIX + join(path, theirs)] = own[ours].detach()
            config["target_modules"] = path.rpartition(".")[2]
