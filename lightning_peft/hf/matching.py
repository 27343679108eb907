"""Compares the files of an adapter with a model, which stays unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.attach_checks import check_starts_leave_ties
from lightning_peft.adapters.plan import plan_attach
from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import join
from lightning_peft.core.site import Site
from lightning_peft.hf.attention_prompts import split_attention_prompts
from lightning_peft.hf.base_copies import Embeddings, base_rewrites
from lightning_peft.hf.keys import Reading, read_keys
from lightning_peft.hf.layouts import layout_for
from lightning_peft.hf.load_checks import check_shared, check_targets
from lightning_peft.hf.method_config import method_fields
from lightning_peft.hf.norm_layers import split_norm_layers
from lightning_peft.hf.prompts import table_of
from lightning_peft.hf.routers import attached_experts, split_router
from lightning_peft.hf.saved_modules import has_separate_copies, saved_modules
from lightning_peft.hf.source import Source
from lightning_peft.hf.targets import exact_targets, targeted, ties_rows
from lightning_peft.hf.token_rows import match_token_rows, split_token_rows
from lightning_peft.hf.values import ValueMatcher, Values
from lightning_peft.layers import adaptable, ops_for
from lightning_peft.methods.base import HFEntry, Method, RouterMethod, SequenceMethod
from lightning_peft.methods.norm_tuning import NormTuning
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.storage import storage_of

__all__ = ["Matched", "match_source"]


@dataclass
class Matched:
    """An adapter whose tensors have their places in the model, which is unchanged.

    Attributes:
        reading: The tensors by layer.
        method: The method for exactly these layers.
        saved: Names of the modules that the file holds trained copies of.
        separate: Whether tied modules have a copy each.
        values: The tensors to copy.
        layers: Number of layers with tensors.
        rewrites: Rows of the base that the file brings along.
    """

    reading: Reading
    method: Method
    saved: list[str]
    separate: bool
    values: Values
    layers: int
    rewrites: Sequence[tuple[Tensor, Tensor]]


def match_source(model: nn.Module, source: Source, embeddings: Embeddings) -> Matched:
    """Compare everything in the files with the model."""
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
    layers = len({e.path for e in reading.entries} | {module for module, *_ in rows})
    layers += len(reading.norms) + len(reading.positions)
    rewrites = base_rewrites(source, reading, embeddings)
    names += source.outside.names
    return Matched(reading, method, names, separate, values, layers, rewrites)


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
