"""Writing a Hugging Face peft directory, driven by the exchange table of each method.

Adapters that peft would compute differently are refused with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_peft.adapters.intact import check_intact
from lightning_peft.core.names import strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.hf.attention_prompts import add_attention_prompts
from lightning_peft.hf.config import base_config
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
from lightning_peft.hf.files import write_adapter, write_tensors
from lightning_peft.hf.hub import upload
from lightning_peft.hf.legacy_names import legacy_names
from lightning_peft.hf.model_card import model_card
from lightning_peft.hf.norm_layers import add_norm_layers
from lightning_peft.hf.outside import (
    OUTSIDE,
    outside_tensors,
    trained_outside,
    warn_of_left_out,
)
from lightning_peft.hf.prompts import add_heads
from lightning_peft.hf.provenance import provenance_of
from lightning_peft.hf.routers import add_router, experts_of
from lightning_peft.hf.targets import misread_names, model_root
from lightning_peft.hf.token_rows import add_token_rows
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import (
    HFEntry,
    HFFormat,
    Method,
    SequenceMethod,
)
from lightning_peft.methods.norm_tuning import NormTuning
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.storage import storage_for

__all__ = ["save_adapter"]


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    names: Literal["current", "legacy"] = "current",
    uniform: bool = False,
    root: str | None = None,
    metrics: Mapping[str, float] | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Write an adapter as a Hugging Face peft 0.21 directory.

    The files are adapter_config.json and adapter_model.safetensors. An adapter named "default" goes
    into `directory`, any other into ``directory/<name>``, as in peft. Initialisations that moved
    part of the base into the adapter (PiSSA, OLoRA, LoftQ) are written in plain form, for the
    original base. The adapters that `XLoRA` mixes are written next to it.

    Args:
        model: A model with the adapter attached.
        directory: Directory to write to, created if absent. Each file is replaced atomically.
        adapter_name: Name of the adapter.
        names: ``"legacy"`` writes the layer names of transformers 4 where they differ, so that the
            adapter loads there.
        uniform: One rank for all layers and scale 1, for servers that ignore rank and alpha
            patterns.
        root: Name of the module inside `model` whose layer names the file uses. By default, the
            one Hugging Face model inside `model`, or `model` itself. Modules that are trained
            outside of it (a head of your own) go into trained_modules.safetensors, which
            `load_adapter` reads and peft leaves alone.
        metrics: Values for the model card (README.md).
        push_to_hub: Name of a repository, ``"org/name"``, to upload the directory to.

    Returns:
        The directory written to.

    Raises:
        KeyError: no adapter of that name.
        ValueError: peft has no equal of the method, or of the method on one of the layers; or a
            layer has no name in transformers 4.
    """
    if names not in ("current", "legacy"):
        raise ValueError(f"save_adapter: names: expected 'current' or 'legacy', got {names!r}")
    check_intact(model, "save_adapter", adapter_name)
    prefix, top = model_root(model, root)
    found, outside = find_adapters(model, adapter_name, strip_compile(prefix))
    method, fmt = exported_method(found)
    experts = experts_of(model, found, strip_compile(prefix))
    apart = TrainableTokens | NormTuning
    weights = [each for each in found if not isinstance(each[2].method, apart)]
    _warn_of_rounded_start(weights)
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
    target = Path(directory) / ("" if adapter_name == "default" else adapter_name)
    metadata = provenance_of(model, adapter_name, strip_compile(prefix))
    for expert in experts:
        save_adapter(model, directory, adapter_name=expert, names=names, root=root)
    outside += trained_outside(model)
    warn_of_left_out(model, adapter_name, outside)
    if outside:
        write_tensors(target / OUTSIDE, *outside_tensors(model, outside, adapter_name))
    card = model_card(top, method, config, _storage_label(model, adapter_name), metrics or {})
    write_adapter(target, config, tensors, card, metadata)
    if push_to_hub is not None:
        upload(target, push_to_hub)
    return target


def _warn_of_rounded_start(found: FoundAdapters) -> None:
    """Warn of a start that moved part of a quantised base into the adapter.

    Training packed Q(W - B0 A0); a reader has W, or Q(W). Both differ by rounding from what was
    trained, and B A - B0 A0 cannot hold that difference.
    """
    names = [
        path
        for path, _, adapter in found
        if isinstance(adapter, WeightAdapter)
        and adapter.rewrite is not None
        and adapter.site.storage.is_quantized
    ]
    if names:
        warnings.warn(
            f"save_adapter: {len(names)} layers, {names[0]!r} first, were quantised after their "
            "start had moved a part of the weight into the adapter. The file fits the original "
            "weight, and outputs differ by the rounding of that weight. Compare outputs after "
            "loading; a checkpoint of the callback restores the run exactly",
            stacklevel=3,
        )


def _storage_label(model: nn.Module, adapter_name: str) -> str:
    """Format that training quantised the base to; "" for none."""
    configs = [
        registry.quantization
        for _, _, registry in registries_in(model)
        if adapter_name in registry.adapters
    ]
    found = next((config for config in configs if config is not None), None)
    return "" if found is None else storage_for(found).label


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
