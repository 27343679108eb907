"""BD-LoRA in peft's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.core.site import Site
from lightning_peft.methods.base import HFEntry
from lightning_peft.methods.exchange import refuse_all_but_linear
from lightning_peft.methods.formats import lora as lora_format

if TYPE_CHECKING:
    from lightning_peft.methods.bd_lora import BDLoRA

__all__ = ["FORMAT"]

_KEYS = {
    "blocks_a": "target_modules_bd_a",
    "blocks_b": "target_modules_bd_b",
    "nblocks": "nblocks",
    "match_strict": "match_strict",
}


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    lora_format.to_config(entries, config)
    method = entries[0].method
    config["use_bdlora"] = {theirs: getattr(method, ours) for ours, theirs in _KEYS.items()}


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    blocks = config["use_bdlora"]
    if not isinstance(blocks, dict) or set(blocks) - set(_KEYS.values()):
        raise ValueError(
            f"adapter_config.json: use_bdlora: expected {sorted(_KEYS.values())}, got {blocks!r}"
        )
    fields = {
        ours: blocks[theirs] for ours, theirs in _KEYS.items() if blocks.get(theirs) is not None
    }
    return {**lora_format.from_config(config, entries, reduces=False), **fields}


def _unpack(
    method: BDLoRA, site: Site, p: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A and B as they are: blocks have no product to reduce a rank by."""
    return dict(p)


#: BDLoRA in a peft directory.
FORMAT = dataclasses.replace(
    lora_format.FORMAT,
    when={**lora_format.FORMAT.when, "use_bdlora": True},
    unpack=_unpack,
    to_config=_to_config,
    from_config=_from_config,
    uniform=None,
    refuse=refuse_all_but_linear,
)
