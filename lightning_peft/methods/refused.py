"""Adapter types and options of peft that are refused on purpose: the reason and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["REFUSED_OPTIONS", "check_not_refused"]

_TYPES = {
    "FROD": "it replaces each weight by factors of that weight, which must be kept next to it, and "
    "on a base in another dtype than that of training its result is wrong. Merge it with peft "
    "(merge_and_unload) on the base of its training and load the merged model",
    "SHADOW": "it is a second transformer that runs next to the model, not a change of its "
    "weights, and cannot be merged. Run it with peft",
}
#: Option of peft's LoRA → why it is refused, and what to do.
REFUSED_OPTIONS = {
    "layer_replication": "it repeats blocks of the model, whose weights the copies share, so that "
    "peft's own merge is wrong. Build the deeper model first (copy the blocks and set "
    "config.num_hidden_layers), save it, and train LoRA on it",
    "use_qalora": "its A acts on averages of the inputs of GPTQ layers, and peft cannot merge it. "
    "Train LoRA on a base in NF4 (quantization='nf4') or on the GPTQ base itself, or run the "
    "adapter with peft. If the base was not GPTQ, peft ignored the option: set use_qalora to false "
    "in the file",
}


def check_not_refused(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a type or an option that no method here will read.

    Args:
        config: Content of adapter_config.json.
        where: Start of the message: the file's name.
    """
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in _TYPES:
        raise ValueError(
            f"{where}: peft_type: expected an adapter that changes weights it finds, got {kind}: "
            f"{_TYPES[kind]}"
        )
    for option, reason in REFUSED_OPTIONS.items():
        if config.get(option):
            raise ValueError(
                f"{where}: {option}: expected an option that is off, got {config[option]!r}: "
                f"{reason}"
            )
