"""Cartridge in peft's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lightning_peft.methods.base import HFEntry
from lightning_peft.methods.formats import prefix_tuning

__all__ = ["FORMAT"]

_PREFIX = prefix_tuning.FORMAT


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    assert _PREFIX.to_config is not None
    _PREFIX.to_config(entries, config)
    for key in ("prefix_projection", "encoder_hidden_size"):
        del config[key]


#: Cartridge in a peft directory.
FORMAT = dataclasses.replace(
    _PREFIX,
    peft_type="CARTRIDGE",
    config={"n": "num_virtual_tokens", "frozen": "num_frozen_tokens"},
    defaults={"num_frozen_tokens": 1},
    to_config=_to_config,
)
