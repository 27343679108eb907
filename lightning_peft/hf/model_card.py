"""README.md of an adapter directory: what it is, what it belongs to, how to use it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.methods.base import Method

__all__ = ["model_card"]

_TAGS = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation"}
_AUTO = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


def model_card(
    top: nn.Module,
    method: Method,
    config: Mapping[str, Any],
    quantization: str,
    metrics: Mapping[str, float],
) -> str:
    """Return the card.

    Args:
        top: The module that the adapter belongs to.
        method: The method.
        config: As in adapter_config.json.
        quantization: Format of the base in training; "" for dense.
        metrics: Logged values by name.
    """
    base = _hub_id(str(config.get("base_model_name_or_path") or ""))
    name = base or base_class(top).__name__
    task = str(config.get("task_type") or "")
    blocks = [
        _header(base, task, method),
        f"# {method.label} adapter for {name}",
        "Trained with [lightning_peft](https://pypi.org/project/lightning-peft/)"
        + (f" on a base quantised to {quantization}." if quantization else "."),
        "## Hyper-parameters\n\n" + _table("field", _hyper_parameters(method)),
    ]
    if metrics:
        rounded = {name: f"{value:.4g}" for name, value in metrics.items()}
        blocks.append("## Metrics\n\n" + _table("metric", rounded))
    blocks.append("## Use\n\n" + _usage(base, task))
    return "\n\n".join(blocks) + "\n"


def _hub_id(name: str) -> str:
    """The name if it is a hub id; "" for a local path, which would mean nothing to others."""
    local = name.startswith((".", "/", "~")) or Path(name).exists()
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not local else ""


def _header(base: str, task: str, method: Method) -> str:
    lines = ["---", "library_name: peft"]
    if base:
        lines.append(f"base_model: {base}")
    if task in _TAGS:
        lines.append(f"pipeline_tag: {_TAGS[task]}")
    tags = ["lightning_peft", "lightning", method.label.lower()]
    if base:
        tags.insert(0, f"base_model:adapter:{base}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _hyper_parameters(method: Method) -> dict[str, Any]:
    fields = dataclasses.fields(cast(Any, method))
    values = {field.name: getattr(method, field.name) for field in fields}
    return {name: value for name, value in values.items() if value not in (None, {}, [], ())}


def _table(head: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {head} | value |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])


def _usage(base: str, task: str) -> str:
    auto = _AUTO.get(task, "AutoModel")
    return (
        "```python\n"
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{base or "path/to/base"}")\n'
        'model = PeftModel.from_pretrained(model, "path/to/this/directory")\n'
        "```\n\n"
        "or, to go on training:\n\n"
        "```python\n"
        "from lightning_peft import PEFT\n\n"
        'trainer = Trainer(callbacks=[PEFT(init_from="path/to/this/directory")])\n'
        "```"
    )
