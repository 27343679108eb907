"""MiSS in peft's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.methods.exchange import config_keys

__all__ = ["FORMAT"]


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    form = entries[0].method.form
    config["init_weights"] = True if form == "default" else form


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    start = config.get("init_weights", True)
    if start not in (True, False, "bat", "mini"):
        raise ValueError(
            f"adapter_config.json: init_weights: expected true, 'bat' or 'mini', got {start!r}"
        )
    return {"form": start if isinstance(start, str) else "default"}


#: MiSS in a peft directory.
FORMAT = HFFormat(
    peft_type="MISS",
    tensors={"D": "miss_block"},
    config=config_keys("bias", "r", "mini_r", dropout="miss_dropout"),
    own_defaults=True,
    defaults={"init_weights": True},
    to_config=_to_config,
    from_config=_from_config,
    kinds=("Linear",),
)
