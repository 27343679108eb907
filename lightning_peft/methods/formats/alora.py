"""aLoRA in peft's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.methods.base import HFEntry
from lightning_peft.methods.exchange import refuse_all_but_features
from lightning_peft.methods.formats import lora as lora_format

__all__ = ["FORMAT"]


def _require_causal(config: Mapping[str, Any]) -> None:
    """Raise where peft's wrapper does not look for the tokens, so that its aLoRA has no effect."""
    if config.get("task_type") != "CAUSAL_LM":
        raise ValueError(
            "adapter_config.json: expected task_type 'CAUSAL_LM' with alora_invocation_tokens, got "
            f"{config.get('task_type')!r}: peft's aLoRA changes nothing in models of other tasks; "
            "use LoRA there"
        )


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    _require_causal(config)
    lora_format.to_config(entries, config)


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    _require_causal(config)
    return lora_format.from_config(config, entries)


#: ALoRA in a peft directory.
FORMAT = dataclasses.replace(
    lora_format.FORMAT,
    config={**lora_format.FORMAT.config, "invocation_tokens": "alora_invocation_tokens"},
    when={**lora_format.FORMAT.when, "alora_invocation_tokens": True},
    to_config=_to_config,
    from_config=_from_config,
    refuse=refuse_all_but_features,
)
