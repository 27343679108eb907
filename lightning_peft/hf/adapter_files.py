"""The content of an adapter directory in memory: config, and tensors under peft's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_peft.adapters.intact import check_intact
from lightning_peft.core.names import strip_compile
from lightning_peft.hf.attention_prompts import add_attention_prompts
from lightning_peft.hf.exported_adapters import (
    FoundAdapters,
    exchange_entries,
    exported_method,
    find_adapters,
)
from lightning_peft.hf.exported_targets import name_targets
from lightning_peft.hf.exported_tensors import (
    add_biases,
    add_saved_modules,
    add_shared,
    file_tensors,
)
from lightning_peft.hf.legacy_names import legacy_names
from lightning_peft.hf.method_config import base_config
from lightning_peft.hf.norm_layers import add_norm_layers
from lightning_peft.hf.prompts import add_heads
from lightning_peft.hf.routers import add_router, experts_of
from lightning_peft.hf.targets import misread_names, model_root
from lightning_peft.hf.token_rows import add_token_rows
from lightning_peft.methods.base import HFEntry, HFFormat, Method, SequenceMethod
from lightning_peft.methods.norm_tuning import NormTuning
from lightning_peft.methods.trainable_tokens import TrainableTokens

__all__ = ["AdapterFiles", "adapter_files"]


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter in the form of a peft directory, in memory.

    Attributes:
        config: Content of adapter_config.json.
        tensors: Content of adapter_model.safetensors.
        prefix: Name in the model of the module whose layer names are used.
        top: That module.
        method: The method.
        weights: Layers that the method itself adapts.
        outside: Names of trained modules outside of `top`.
        experts: Names of the adapters that this one mixes.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    prefix: str
    top: nn.Module
    method: Method
    weights: FoundAdapters
    outside: list[str]
    experts: list[str]


def adapter_files(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    names: Literal["current", "legacy"] = "current",
    uniform: bool = False,
    root: str | None = None,
) -> AdapterFiles:
    """Return what `save_adapter` writes under the same arguments; nothing is written.

    Raises:
        KeyError: no adapter of that name.
        ValueError: an adapter that peft has no equal of.
    """
    check_intact(model, "save_adapter", adapter_name)
    prefix, top = model_root(model, root)
    found, outside = find_adapters(model, adapter_name, strip_compile(prefix))
    method, fmt = exported_method(found)
    experts = experts_of(model, found, strip_compile(prefix))
    apart = TrainableTokens | NormTuning
    weights = [each for each in found if not isinstance(each[2].method, apart)]
    entries = exchange_entries(weights, method, fmt, misread_names(top, fmt))
    config = _config(top, method, fmt, entries, uniform=uniform)
    if fmt.tensors:
        name_targets(top, entries, config)
        if fmt.shares_by_target and isinstance(config["target_modules"], str):
            raise ValueError(
                f"save_adapter: expected layers that a list of names selects, since peft's "
                f"{fmt.peft_type} shares tensors by entry of the list, got "
                f"{config['target_modules']!r}; keep the adapter with adapter_state_dict()"
            )
    tensors = file_tensors(fmt, entries)
    add_shared(found, fmt, entries, config, tensors)
    add_biases(found, tensors)
    add_token_rows(top, found, method, config, tensors)
    add_norm_layers(top, found, config, tensors)
    add_attention_prompts(found, config, tensors)
    add_router(found, Path(directory), config, tensors)
    add_saved_modules(model, top, found, fmt, adapter_name, strip_compile(prefix), config, tensors)
    if isinstance(method, SequenceMethod):
        add_heads(top, fmt, config, tensors)
    if names == "legacy":
        config, tensors = legacy_names(top, fmt, config, tensors)
    return AdapterFiles(
        config, tensors, strip_compile(prefix), top, method, weights, outside, experts
    )


def _config(
    top: nn.Module, method: Method, fmt: HFFormat, entries: list[HFEntry], *, uniform: bool
) -> dict[str, Any]:
    """Return the config but for its targets; `uniform` pads the entries' tensors."""
    config = base_config(top, fmt)
    config.update({theirs: getattr(method, ours) for ours, theirs in fmt.config.items()})
    config.update({**fmt.fixed, **fmt.inert})
    if uniform and fmt.uniform is None:
        raise ValueError(
            f"save_adapter(uniform=True): expected a method with ranks, got {method.label}"
        )
    finish = fmt.uniform if uniform else fmt.to_config
    if finish is not None:
        finish(entries, config)
    return config
