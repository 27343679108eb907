"""Prompts and prefixes in a Hugging Face peft directory: one table per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.placement.placement import PlannedAdapter
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import in_adapter, join
from lightning_peft.methods.base import HFFormat, Method

__all__ = ["add_heads", "table_of"]

#: Task → modules that peft assumes are trained with a prompt, and expects in a file.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def add_heads(
    top: nn.Module, fmt: HFFormat, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Add the heads that peft expects, unchanged."""
    heads = _HEADS.get(config["task_type"], ())
    for name, module in base_modules(top).items():
        if not heads or not name.endswith(heads) or in_adapter(name):
            continue
        for key, value in module.state_dict().items():
            if value.is_floating_point() and not in_adapter(key):
                tensors.setdefault(fmt.saved_prefix + join(name, key), value)


def table_of(
    method: Method,
    fmt: HFFormat,
    config: Mapping[str, Any],
    planned: Sequence[PlannedAdapter],
    shared: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return a prompt's or prefix's table in our layout.

    Raises:
        ValueError: the file lacks it, or its shape is another.
    """
    missing = sorted(set(fmt.prefix) - set(shared))
    if missing:
        raise ValueError(
            f"adapter file: expected {[fmt.prefix[n] for n in missing]}, found none; nothing was "
            "loaded"
        )
    site = next(p.placement.site for p in planned if p.method is method)
    assert fmt.unpack is not None
    return dict(fmt.unpack(method, site, shared, config))
