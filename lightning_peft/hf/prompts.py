"""Prompts and prefixes in a Hugging Face peft directory: one table for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.attach import Planned
from lightning_peft.hf.keys import joined
from lightning_peft.methods.base import HFFormat

__all__ = ["add_heads", "table_of"]

#: Modules that peft takes for trained by a prompt's task, and misses in a file without them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def add_heads(
    top: nn.Module, fmt: HFFormat, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write the heads that peft expects, as they are."""
    heads = _HEADS.get(config["task_type"], ())
    for name, module in top.named_modules():
        if not heads or not name.endswith(heads) or "peft" in name.split("."):
            continue
        for key, value in module.state_dict().items():
            if value.is_floating_point() and "peft" not in key.split("."):
                tensors.setdefault(fmt.saved_prefix + joined(name, key), value)


def table_of(
    method: Any,
    fmt: HFFormat,
    config: Mapping[str, Any],
    planned: list[Planned],
    shared: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A prompt's or prefix's table in our layout."""
    missing = sorted(set(fmt.prefix) - set(shared))
    if missing:
        raise ValueError(
            f"adapter file: expected {[fmt.prefix[n] for n in missing]}, found none; nothing was "
            "loaded"
        )
    site = next(p.site for m, _, p in planned if m is method)
    assert fmt.unpack is not None
    return dict(fmt.unpack(method, site, shared, config))
