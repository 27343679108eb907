"""Writing a Hugging Face peft directory, driven by the exchange table of each method.

Adapters that peft would compute differently are refused with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import nn

from lightning_peft.core.registry import registries_in
from lightning_peft.core.value_types import shown
from lightning_peft.hf.adapter_files import adapter_files
from lightning_peft.hf.exported_adapters import (
    FoundAdapters,
)
from lightning_peft.hf.files import require_directory, write_adapter, write_tensors
from lightning_peft.hf.hub import upload
from lightning_peft.hf.model_card import model_card
from lightning_peft.hf.outside import (
    OUTSIDE,
    outside_tensors,
    trained_outside,
    warn_of_left_out,
)
from lightning_peft.hf.provenance import provenance_of
from lightning_peft.layers.weight_adapter import WeightAdapter
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
        FileExistsError: `directory` is a file, or lies inside of one.
        KeyError: no adapter of that name.
        ValueError: peft has no equal of the method, or of the method on one of the layers; or a
            layer has no name in transformers 4.
    """
    if names not in ("current", "legacy"):
        raise ValueError(f"save_adapter: names: expected 'current' or 'legacy', got {shown(names)}")
    require_directory(Path(directory), "save_adapter")
    files = adapter_files(model, directory, adapter_name, names=names, uniform=uniform, root=root)
    _warn_of_rounded_start(files.weights)
    target = Path(directory) / ("" if adapter_name == "default" else adapter_name)
    metadata = provenance_of(model, adapter_name, files.prefix)
    for expert in files.experts:
        save_adapter(model, directory, adapter_name=expert, names=names, root=root)
    outside = files.outside + trained_outside(model)
    warn_of_left_out(model, adapter_name, outside)
    if outside:
        write_tensors(target / OUTSIDE, *outside_tensors(model, outside, adapter_name))
    label = _storage_label(model, adapter_name)
    card = model_card(files.top, files.method, files.config, label, metrics or {})
    write_adapter(target, files.config, files.tensors, card, metadata)
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
