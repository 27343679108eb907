"""Config entries about the model that peft writes for prompts and prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.exchange import HFEntry

__all__ = ["model_config", "sequence_site", "submodule_count"]


def sequence_site(entries: Sequence[HFEntry]) -> SequenceSite:
    """Return the place of a prompt: the one entry of its method."""
    site = entries[0].site
    assert isinstance(site, SequenceSite)
    return site


def submodule_count(site: SequenceSite) -> int:
    """Number of stacks that peft assumes if a file does not say."""
    return 2 if site.task == "SEQ_2_SEQ_LM" else 1


def model_config(site: SequenceSite, token_dim: int) -> dict[str, Any]:
    """Return peft's config entries that describe the model."""
    return {
        "task_type": site.task,
        "auto_mapping": None,
        "token_dim": token_dim,
        "num_layers": len(site.layers) or 1,
        "num_attention_heads": 1,
        "num_transformer_submodules": 1,
    }
