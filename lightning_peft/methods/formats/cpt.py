"""CPT in peft's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.methods.base import HFEntry
from lightning_peft.methods.formats import prompt_tuning
from lightning_peft.methods.formats.prompt_parts import model_config, sequence_site

__all__ = ["FORMAT"]

_PROMPT = prompt_tuning.FORMAT


def _to_config(entries: Sequence[HFEntry], config: dict[str, Any]) -> None:
    site, method = sequence_site(entries), entries[0].method
    config.update(model_config(site, site.width))
    config.update(
        cpt_mask=[1] * method.n,
        cpt_token_ids=list(method.init_ids),
        cpt_tokens_type_mask=list(method.types),
        opt_weighted_loss_type="none" if method.decay == 1.0 else "decay",
    )


def _from_config(config: Mapping[str, Any], entries: Sequence[HFEntry]) -> dict[str, Any]:
    fields: dict[str, Any] = {"init": "text"}
    for ours, theirs in (("init_ids", "cpt_token_ids"), ("types", "cpt_tokens_type_mask")):
        value = config.get(theirs)
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise ValueError(
                f"adapter_config.json: {theirs}: expected a list of integers, got {value!r}"
            )
        fields[ours] = value
    if config.get("opt_weighted_loss_type") != "decay":
        fields["decay"] = 1.0
    return fields


#: CPT in a peft directory.
FORMAT = dataclasses.replace(
    _PROMPT,
    peft_type="CPT",
    config={
        "n": "num_virtual_tokens",
        "epsilon": "opt_projection_epsilon",
        "format_epsilon": "opt_projection_format_epsilon",
        "decay": "opt_loss_decay_factor",
    },
    fixed={},
    defaults={
        "opt_projection_epsilon": 0.1,
        "opt_projection_format_epsilon": 0.1,
        "opt_loss_decay_factor": 1.0,
    },
    ignored=(
        *_PROMPT.ignored,
        *("cpt_mask", "cpt_token_ids", "cpt_tokens_type_mask", "opt_weighted_loss_type"),
    ),
    to_config=_to_config,
    from_config=_from_config,
)
