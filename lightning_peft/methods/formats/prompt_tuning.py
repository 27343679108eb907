"""PromptTuning in peft's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.core.site import SequenceSite
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.formats.prompt_parts import (
    model_config,
    sequence_site,
    unpack_prompt,
)

if TYPE_CHECKING:
    from lightning_peft.methods.prompt_tuning import PromptTuning

__all__ = ["FORMAT"]


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    site = sequence_site(entries)
    config.update(model_config(site, site.width))


def _refuse(method: PromptTuning, site: SequenceSite) -> str:
    if method.mode == "add":
        return "peft has no prompts that are added"
    return "" if site.embedding else "a transformer of your own has no equal there"


#: PromptTuning in a peft directory.
FORMAT = HFFormat(
    peft_type="PROMPT_TUNING",
    tensors={},
    prefix={"P": "prompt_embeddings"},
    config={"n": "num_virtual_tokens"},
    fixed={"prompt_tuning_init": "RANDOM"},
    ignored=(
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
        *("tokenizer_kwargs", "token_dim", "num_layers", "num_attention_heads"),
        "num_transformer_submodules",
    ),
    saved_prefix="base_model.",
    unpack=unpack_prompt,
    to_config=_to_config,
    refuse=_refuse,
)
