"""Target names in the config that `save_adapter` writes, checked against what peft can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.core.modules import is_conv1d
from lightning_peft.hf.targets import compact
from lightning_peft.methods.base import (
    HFEntry,
)

__all__ = ["name_targets"]


def name_targets(top: nn.Module, entries: list[HFEntry], config: dict[str, Any]) -> None:
    """Write the names of targets into the config.

    Raises:
        ValueError: single weights under an option that peft does not have for them.
    """
    modules: set[str] = set()
    parameters: set[str] = set()
    for e in entries:
        (parameters if e.by_weight else modules).add(e.target)
    if modules or parameters:
        config["target_modules"] = compact(top, modules) if modules else None
    if parameters:
        config["target_parameters"] = sorted(parameters)
        _check_target_parameters(config, sorted(parameters))
        _check_recurrent_biases(config, entries)
    if "fan_in_fan_out" in config:  # peft's word for GPT-2's [in, out] weights
        config["fan_in_fan_out"] = any(is_conv1d(e.site.module) for e in entries)


def _check_target_parameters(config: dict[str, Any], names: list[str]) -> None:
    """Check that peft's wrapper of a single weight can hold the adapter; drop the dropout.

    Raises:
        ValueError: the method is not LoRA, or it is DoRA, or B has a bias.
    """
    other = config["peft_type"] != "LORA"
    for key in ("use_dora", "lora_bias", *(["peft_type"] if other else [])):
        if config.get(key):
            raise ValueError(
                "save_adapter: expected layers that peft adapts as modules under "
                f"{key}={config[key]}, got {names[:3]}, which it adapts as single weights, by "
                "plain LoRA only; exclude them (exclude_modules), or keep the adapter with "
                "adapter_state_dict()"
            )
    if config.get("lora_dropout"):
        config["lora_dropout"] = 0.0


def _check_recurrent_biases(config: Mapping[str, Any], entries: list[HFEntry]) -> None:
    recurrent = [e.path for e in entries if e.layout.kind == "recurrent"]
    if recurrent and config.get("bias", "none") != "none":
        raise ValueError(
            f"save_adapter: {recurrent[0]!r}: expected bias='none' next to a recurrent layer, got "
            f"bias={config['bias']!r}: peft 0.21 takes its switch for biases for a tensor and "
            "cannot read the file; keep the adapter with adapter_state_dict()"
        )
