"""Reading a Hugging Face peft directory.

Every tensor and option is checked against the model before the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.adoption import adopted_layers
from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.attach_checks import check_adapter_name
from lightning_peft.adapters.detach import detach
from lightning_peft.adapters.new_layers import new_layers_of
from lightning_peft.adapters.snapshot import ModelSnapshot
from lightning_peft.core.allocation_limit import AllocationLimit
from lightning_peft.core.finite import is_finite
from lightning_peft.core.names import matches_suffix
from lightning_peft.core.value_types import shown
from lightning_peft.hf.base_copies import Embeddings, rewritten
from lightning_peft.hf.error_source import naming_files
from lightning_peft.hf.matching import Matched, match_source
from lightning_peft.hf.routers import load_arrow
from lightning_peft.hf.source import Source, read_source
from lightning_peft.hf.task_heads import Heads
from lightning_peft.hf.values import COPY, Values
from lightning_peft.layers.adapted import adapted_modules, adapters_of, weight_adapters_of
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import Method
from lightning_peft.report.summary import Report
from lightning_peft.storage import StorageConfig, as_config

__all__ = ["load_adapter"]


def load_adapter(
    model: nn.Module,
    directory: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    quantization: StorageConfig | str | None = None,
    root: str | None = None,
    alpha: float | None = None,
    config: Any = None,
    enable_lora: Sequence[bool] | None = None,
    modules_to_save: Sequence[str] | None = (),
    device: torch.device | str | None = None,
    heads: Heads = "load",
    embeddings: Embeddings = "check",
) -> Report:
    """Attach the adapter of a Hugging Face peft directory, in place.

    Layer names from before transformers 5 are mapped to the model's present names. LoRA files of
    Kohya's scripts, diffusers and loralib are read if every tensor has a certain place and scale,
    and refused by name otherwise. Nothing is ever unpickled.

    Loading is strict: a missing, extra, misshapen or non-finite tensor raises, and so does an
    option of unknown effect. ``directory/<adapter_name>`` is preferred if it exists, because peft
    writes adapters there.

    Args:
        model: The base, or a module (a LightningModule) that holds it.
        directory: A directory with adapter_config.json and adapter_model.safetensors; or a
            .safetensors file of Kohya, diffusers or loralib, or a directory with one; or a state
            dict of theirs, or of a `PeftModel`.
        adapter_name: Name to attach under.
        quantization: Quantise the frozen base too: ``"nf4"``, or a configuration.
        root: Name of the module inside `model` whose layer names the file uses. By default, the
            one Hugging Face model inside `model`, or `model` itself.
        alpha: lora_alpha of a file that does not hold it: loralib's, and Kohya's or diffusers'
            without an alpha in the tensors or in the header.
        config: Config of a `PeftModel` whose state dict is given, as
            ``peft_model.peft_config["default"]``; a directory has its own.
        enable_lora: loralib's argument of MergedLinear, needed if some parts are off.
        modules_to_save: Modules to train fully besides those of the directory, as in `attach`.
        device: Where to quantise, as in `attach`.
        heads: ``"skip"`` leaves out the trained heads of a peft directory, and reads the rest into
            the bare base too.
        embeddings: ``"restore"`` writes the embeddings that a peft directory holds into the base,
            as peft does: the rows of new tokens after ``resize_token_embeddings``. By default they
            must equal the base's.

    Returns:
        The report of attaching. Its notes count the tensors and layers loaded.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: anything in the files that does not fit; the model is as before.
        RuntimeError: the adapter's name is taken.
    """
    if heads not in ("load", "skip"):
        raise ValueError(f"load_adapter: heads: expected 'load' or 'skip', got {shown(heads)}")
    if embeddings not in ("check", "restore"):
        raise ValueError(
            f"load_adapter: embeddings: expected 'check' or 'restore', got {shown(embeddings)}"
        )
    storage = as_config(quantization)
    check_adapter_name(adapter_name)
    if not isinstance(directory, str | Path | Mapping):
        raise TypeError(
            f"load_adapter: expected a directory, a file or a state dict, got {shown(directory)}; "
            "write load_adapter(model, 'adapter')"
        )
    naming = partial(naming_files, directory, adapter_name)
    with naming():
        source = read_source(
            model, directory, adapter_name, root, alpha, enable_lora, config, heads
        )
    if source.config.get("arrow_config"):
        if storage is not None:
            raise ValueError(
                "load_adapter: quantization: expected None for an Arrow router, got "
                f"{quantization!r}; the base is quantised when you load the first of the adapters "
                "that it routes to"
            )
        with naming():
            return load_arrow(model, source.config, adapter_name)
    # A snapshot would keep the dense weights of layers that are packed.
    snapshot = None if storage is not None else ModelSnapshot(model)
    try:
        limit = AllocationLimit.for_loading(model, source.tensors.values())
        with adopted_layers(model), limit:  # a refusal gives the layers back
            with naming():
                matched = match_source(model, source, embeddings)
            return _load(
                model, source, matched, adapter_name, storage, modules_to_save, device, naming
            )
    except BaseException:
        if snapshot is not None:
            snapshot.restore(_weight_adapters(model, adapter_name))
        raise


def _weight_adapters(model: nn.Module, adapter_name: str) -> list[WeightAdapter]:
    modules = adapted_modules(model)
    return [a for _, m in modules for a in weight_adapters_of(m, adapter_name)]


def _load(
    model: nn.Module,
    source: Source,
    matched: Matched,
    adapter_name: str,
    quantization: StorageConfig | None,
    modules_to_save: Sequence[str] | None,
    device: torch.device | str | None,
    naming: Callable[[], AbstractContextManager[None]],
) -> Report:
    """Attach the method and copy the values; `naming` is for errors about the files."""
    reading, method = matched.reading, matched.method
    with rewritten(matched.rewrites):
        report = attach(
            model,
            method,
            adapter_name=adapter_name,
            quantization=quantization,
            modules_to_save=_trained(model, method, matched.saved, modules_to_save),
            device=device,
            separate_copies=matched.separate,
        )
        try:
            with naming():
                count = _copy(model, adapter_name, matched.values, reading.shared)
                count += source.outside.copy_into(model, adapter_name)
        except BaseException:
            if quantization is not None:
                detach(model, adapter_name)
            raise
    report.notes += [
        f"{adapter_name}: {count} tensors loaded into {matched.layers} of {matched.layers} layers",
        *reading.notes,
    ]
    return report


def _trained(
    model: nn.Module, method: Method, saved: Sequence[str], given: Sequence[str] | None
) -> list[str]:
    """Modules to train fully: those of the file, and those given or, for None, new layers."""
    more = new_layers_of(model, method).trained if given is None else given
    return [*saved, *(m for m in more if not matches_suffix(m, saved))]


def _copy(model: nn.Module, adapter_name: str, values: Values, shared: Mapping[str, Tensor]) -> int:
    """Copy into the attached tensors and return how many; shared ones are compared by shape."""
    live: list[tuple[Tensor, Tensor]] = []
    tables: list[tuple[PromptAdapter, Tensor]] = []
    missing = dict(shared)
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module, adapter_name):
            for path, copied in adapter.substitutes().items():
                key = (id(module), path, COPY)
                if key in values:
                    live.append((copied, values[key]))
            if isinstance(adapter, PromptAdapter) and "P" in missing:
                tables.append((adapter, missing.pop("P")))
            for name, tensor in adapter.tensors().items():
                value = values.get((id(module), adapter.site.parameter, name))
                if value is not None:
                    live.append((tensor, value))
                elif name in missing and missing[name].shape == tensor.shape:
                    live.append((tensor, missing.pop(name)))
    if missing:
        raise ValueError(
            "adapter file: expected no tensors besides the adapter's, got "
            f"{ {k: list(t.shape) for k, t in missing.items()} }; nothing was loaded"
        )
    for tensor, value in live:
        _check_range(tensor, value)
    with torch.no_grad():
        for tensor, value in live:
            tensor.copy_(value)
        for adapter, table in tables:
            adapter.method.load_prompt_embeddings(adapter.block, table, adapter.site)
    return len(live) + len(tables)


def _check_range(tensor: Tensor, value: Tensor) -> None:
    """Raise ValueError where a finite value overflows; VB-LoRA's own are infinite in places."""
    if not tensor.is_floating_point() or not is_finite(value):
        return
    if not is_finite(value.to(tensor.dtype)):
        raise ValueError(
            f"adapter file: expected values in the range of {tensor.dtype}, got "
            f"{float(value.abs().max()):.3g}; load it into a model of a wider dtype; nothing was "
            "loaded"
        )
