"""Reading a Hugging Face peft directory.

Every tensor and option is checked against the model before the model is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.adoption import adopted_layers
from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.attach_checks import check_adapter_name, check_starts_leave_ties
from lightning_peft.adapters.detach import detach
from lightning_peft.adapters.new_layers import new_layers_of
from lightning_peft.adapters.plan import plan_attach
from lightning_peft.adapters.snapshot import ModelSnapshot
from lightning_peft.core.allocation_limit import AllocationLimit
from lightning_peft.core.finite import is_finite
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import join, matches_suffix
from lightning_peft.core.site import Site
from lightning_peft.hf.attention_prompts import split_attention_prompts
from lightning_peft.hf.base_copies import Embeddings, base_rewrites, rewritten
from lightning_peft.hf.config import method_fields
from lightning_peft.hf.keys import Reading, read_keys
from lightning_peft.hf.layouts import layout_for
from lightning_peft.hf.load_checks import check_shared, check_targets
from lightning_peft.hf.norm_layers import split_norm_layers
from lightning_peft.hf.prompts import table_of
from lightning_peft.hf.routers import attached_experts, load_arrow, split_router
from lightning_peft.hf.source import Source, read_source
from lightning_peft.hf.targets import exact_targets, targeted, ties_rows
from lightning_peft.hf.task_heads import Heads
from lightning_peft.hf.token_rows import match_token_rows, split_token_rows
from lightning_peft.hf.values import (
    COPY,
    ValueMatcher,
    Values,
    has_separate_copies,
    saved_modules,
)
from lightning_peft.layers import adaptable, ops_for
from lightning_peft.layers.adapted import adapted_modules, adapters_of, weight_adapters_of
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import HFEntry, Method, RouterMethod, SequenceMethod
from lightning_peft.methods.norm_tuning import NormTuning
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.report.summary import Report
from lightning_peft.storage import StorageConfig, as_config, storage_of

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
        raise ValueError(f"load_adapter: heads: expected 'load' or 'skip', got {heads!r}")
    if embeddings not in ("check", "restore"):
        raise ValueError(
            f"load_adapter: embeddings: expected 'check' or 'restore', got {embeddings!r}"
        )
    storage = as_config(quantization)
    check_adapter_name(adapter_name)
    source = read_source(model, directory, adapter_name, root, alpha, enable_lora, config, heads)
    if source.config.get("arrow_config"):
        if storage is not None:
            raise ValueError(
                "load_adapter: quantization: expected None for an adapter that mixes attached "
                f"ones, got {quantization!r}; quantise when the first of them is loaded"
            )
        return load_arrow(model, source.config, adapter_name)
    # A snapshot would keep the dense weights of layers that are packed.
    snapshot = None if storage is not None else ModelSnapshot(model)
    try:
        with adopted_layers(model):  # a refusal gives them back
            return _load(model, source, adapter_name, storage, modules_to_save, device, embeddings)
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
    adapter_name: str,
    quantization: StorageConfig | None,
    modules_to_save: Sequence[str] | None,
    device: torch.device | str | None,
    embeddings: Embeddings,
) -> Report:
    with AllocationLimit.for_loading(model, source.tensors.values()):
        reading = _read(source)
        method = _method(model, source, reading)
        saved = saved_modules(source, reading)
        names = [join(source.prefix, name) for name in saved]
        separate = has_separate_copies(source, saved)
        planned = plan_attach(model, [method], names, separate).adapters
        check_starts_leave_ties(model, planned)
        values = ValueMatcher(method, source, reading, saved).match(planned)
        rows = match_token_rows(planned, reading.rows, source.config, source.top, source.prefix)
        values |= rows
        if isinstance(method, SequenceMethod):
            reading.shared = table_of(method, source.format, source.config, planned, reading.shared)
        else:
            check_shared(source.format, reading)
        rewrites = base_rewrites(source, reading, embeddings)
        trained = _trained(model, method, [*names, *source.outside.names], modules_to_save)
        with rewritten(rewrites):
            report = attach(
                model,
                method,
                adapter_name=adapter_name,
                quantization=quantization,
                modules_to_save=trained,
                device=device,
                separate_copies=separate,
            )
            try:
                count = _copy(model, adapter_name, values, reading.shared)
                count += source.outside.copy_into(model, adapter_name)
            except BaseException:
                if quantization is not None:
                    detach(model, adapter_name)
                raise
    layers = len({e.path for e in reading.entries} | {module for module, *_ in rows})
    layers += len(reading.norms) + len(reading.positions)
    report.notes += [
        f"{adapter_name}: {count} tensors loaded into {layers} of {layers} layers",
        *reading.notes,
    ]
    return report


def _trained(
    model: nn.Module, method: Method, saved: Sequence[str], given: Sequence[str] | None
) -> list[str]:
    """Modules to train fully: those of the file, and those given or, for None, new layers."""
    more = new_layers_of(model, method).trained if given is None else given
    return [*saved, *(m for m in more if not matches_suffix(m, saved))]


def _read(source: Source) -> Reading:
    """Sort the file's tensors and compare the adapted layers with the config's targets."""
    fmt, config = source.format, source.config
    rows, tensors = split_token_rows(source.tensors)
    norms, tensors = split_norm_layers(tensors)
    positions, tensors = split_attention_prompts(tensors)
    router, tensors = split_router(tensors)
    reading = read_keys(fmt, tensors, source.top, source.prefix, config)
    reading.rows, reading.norms, reading.positions = rows, norms, positions
    reading.router = router
    reading.notes += source.notes
    if issubclass(source.method, TrainableTokens):
        return reading
    _add_entries_by_config(source, reading)
    if fmt.tensors:
        check_targets(source, reading)
    return reading


def _method(model: nn.Module, source: Source, reading: Reading) -> Method:
    """Build the method that the config describes, for exactly the layers of the file."""
    fields = method_fields(source.method, source.config, reading.entries)
    if issubclass(source.method, TrainableTokens):
        fields["target_modules"] = source.config.get("target_modules")
        layers = base_modules(source.top)
        named = [layers[path] for path in reading.rows if path in layers]
        fields["tied"] = any(ties_rows(source.top, module) for module in named)
    if issubclass(source.method, RouterMethod):
        fields["adapters"] = attached_experts(model, source.config)
    if issubclass(source.method, NormTuning):
        fields |= _norm_targets(source, reading)
    if reading.entries:
        fields["target_modules"] = exact_targets(model, [e.site for e in reading.entries])
    try:
        method = source.method(**fields)
    except TypeError as error:
        raise ValueError(f"adapter_config.json: {error}; nothing was loaded") from None
    _require_equals(source, method, reading)
    return method


def _norm_targets(source: Source, reading: Reading) -> dict[str, Any]:
    """Targets of `NormTuning`: the layers whose tensors are in the file."""
    layers = base_modules(source.top)
    unknown = [n for n in reading.norms if n not in layers or list(layers[n].children())]
    if unknown or not reading.norms:
        raise ValueError(
            f"adapter file: LN_TUNING: expected layers of {type(source.top).__name__} without "
            f"parts, got {unknown[:5] or 'none'}; nothing was loaded"
        )
    norms = ["norm" in type(layers[n]).__name__.lower() for n in reading.norms]
    return {
        "any_layer": not all(norms),
        "target_modules": [join(source.prefix, name) for name in reading.norms],
    }


def _require_equals(source: Source, method: Method, reading: Reading) -> None:
    """Raise ValueError where the method computes something else on a layer than peft's does."""
    refuse = source.format.refuse
    if refuse is None:
        return
    for e in reading.entries:
        reason = refuse(method, e.site)
        if reason:
            raise ValueError(
                f"adapter file: {method.label} on {e.path!r} has no equal here: {reason}; exclude "
                "the layer, or go on running the adapter in peft; nothing was loaded"
            )


def _add_entries_by_config(source: Source, reading: Reading) -> None:
    """Add an entry per target of the config, if the file has shared tensors only."""
    fmt = source.format
    if reading.entries or not reading.shared or set(fmt.tensors) - set(fmt.optional):
        return
    wants = targeted(source.config, source.top)
    for name, module in base_modules(source.top).items():
        ops = ops_for(module) if name and wants(name, module) and adaptable(module) else None
        if ops is not None:
            storage = storage_of(module, "weight")
            site = Site(module, "weight", join(source.prefix, name), ops, storage)
            layout = layout_for(ops, module)
            reading.entries.append(HFEntry(name, site, layout, None, {}))


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
