"""Keys of adapter_model.safetensors: written for a place in the model, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import join
from lightning_peft.core.site import Site
from lightning_peft.hf.layouts import layout_for
from lightning_peft.hf.targets import targeted_weights
from lightning_peft.layers import adaptable, ops_for, parameter_ops
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.models.modules import hf_models
from lightning_peft.models.target_modules import bypassed
from lightning_peft.storage import storage_of

__all__ = ["PREFIX", "Reading", "bias_key", "read_keys", "tensor_prefix"]

PREFIX = "base_model.model."


def tensor_prefix(path: str, place: str) -> str:
    """Return the part of a key before the tensor's own name.

    Args:
        path: Name of the module.
        place: Path inside peft's wrapper, "" without one.
    """
    return PREFIX + join(path, place)


def bias_key(module: nn.Module, path: str, bias: str, adapted: Iterable[str]) -> str:
    """Return the key of a trained bias: below ``base_layer`` if its weight is adapted."""
    ops = ops_for(module)
    if ops is not None:
        places = layout_for(ops, module).nested_paths(list(adapted))
        for name, place in places.items():
            if ops.bias(module, name) == bias:
                return PREFIX + join(path, place, "base_layer", bias.rpartition(".")[2])
    return PREFIX + join(path, bias)


@dataclass
class Reading:
    """The tensors of a file by kind.

    Attributes:
        entries: Adapted weights.
        norms: Trained normalisation layers by name, with their parameters.
        positions: Trained positions in attention, by the attention module's name.
        router: Tensors of the module that mixes adapters, by their names in it.
        rows: Trained token rows, by the embedding's name.
        shared: Tensors that occur once for the model, by our names.
        other: All other tensors: trained copies, biases, copies of the base.
        notes: The tensors left out, each with the reason.
    """

    entries: list[HFEntry] = field(default_factory=list)
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    positions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    router: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_keys(
    fmt: HFFormat,
    tensors: Mapping[str, Tensor],
    top: nn.Module,
    prefix: str,
    config: Mapping[str, Any],
) -> Reading:
    """Sort a file's tensors by place in the model.

    Args:
        fmt: The method's table.
        tensors: As in the file, in current layer names.
        top: The module whose names the file uses.
        prefix: Its name in the caller's model.
        config: As in adapter_config.json.

    Raises:
        ValueError: tensors for a module that is not there or cannot hold them, with the list.
    """
    reading = Reading()
    groups = _groups(fmt, tensors, top, tuple(config.get("modules_to_save") or ()), reading)
    modules = base_modules(top)
    unknown = sorted(p for p in groups if _split(p, modules)[0] not in modules)
    if unknown:
        parts = [
            part
            for part, _ in hf_models(top)
            if part and all(f"{part}.{_split(p, modules)[0]}" in modules for p in unknown)
        ]
        advice = f"name its part: PEFT(root={parts[0]!r}), or load_adapter on it" if parts else ""
        raise ValueError(
            f"adapter file: expected modules of {type(top).__name__}, got tensors for "
            f"{len(unknown)} others, as {unknown[:3]}; the first modules here are "
            f"{[n for n, m in modules.items() if adaptable(m)][:3]}; "
            f"{advice or 'is this the right base model?'}"
        )
    by_module: dict[str, dict[str, dict[str, Tensor]]] = {}
    for path, found in groups.items():
        name, place = _split(path, modules)
        by_module.setdefault(name, {})[place] = found
    problems: list[str] = []
    unread = bypassed(list(modules.items()))
    for name, places in sorted(by_module.items()):
        if name in unread and _no_change(places):
            reading.notes.append(f"{name}: left out, its change is 0 ({unread[name]})")
            continue
        _read_module(fmt, name, modules[name], places, prefix, config, reading, problems)
    if problems:
        raise ValueError("adapter file: nothing was loaded:\n  " + "\n  ".join(problems[:20]))
    return reading


def _groups(
    fmt: HFFormat,
    tensors: Mapping[str, Tensor],
    top: nn.Module,
    saved: tuple[str, ...],
    into: Reading,
) -> dict[str, dict[str, Tensor]]:
    """Map each path in the file to its tensors by name; other tensors go to `into`."""
    suffixes = sorted({*fmt.tensors.values(), *fmt.lookup.values()}, key=len, reverse=True)
    whole = {theirs: ours for ours, theirs in fmt.prefix.items()}
    own = {n for n, _ in top.named_parameters()} if saved else set()
    for ours, key in fmt.prefix.items():
        if "{i}" in key:
            tensors = _stacked(ours, key, tensors, into)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        rest = key.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if rest.endswith(f".{s}") or rest == s), None)
        if suffix is None and any(f".{name}" in key for name in fmt.dropped):
            into.notes.append(f"{key}: left out, it acts in training alone")
        elif key in whole:
            into.shared[whole[key]] = tensor
        elif not key.startswith(PREFIX) or suffix is None or rest in own:
            into.other[key] = tensor
        else:
            groups.setdefault(rest[: -len(suffix)].removesuffix("."), {})[suffix] = tensor
    return groups


def _stacked(
    ours: str, key: str, tensors: Mapping[str, Tensor], into: Reading
) -> Mapping[str, Tensor]:
    """Put the rows of a shared tensor, one entry each in the file, together; returns the rest."""
    rows: list[Tensor] = []
    while key.format(i=len(rows)) in tensors:
        rows.append(tensors[key.format(i=len(rows))])
    if len({row.shape for row in rows}) > 1:
        raise ValueError(
            f"adapter file: {key}: expected rows of one shape, got "
            f"{sorted({tuple(row.shape) for row in rows})}; nothing was loaded"
        )
    if rows:
        into.shared[ours] = torch.stack(rows)
    read = {key.format(i=i) for i in range(len(rows))}
    return {k: t for k, t in tensors.items() if k not in read}


def _split(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Split a path into the module's name and the path below it, from ``base_layer`` on."""
    if path in modules:
        return path, ""
    name, found, place = f".{path}".partition(".base_layer")
    return (name.removeprefix("."), f"base_layer{place}") if found else (path, "")


def _read_module(
    fmt: HFFormat,
    name: str,
    module: nn.Module,
    places: Mapping[str, Mapping[str, Tensor]],
    prefix: str,
    config: Mapping[str, Any],
    reading: Reading,
    problems: list[str],
) -> None:
    ops, named = parameter_ops(module), targeted_weights(config)
    single = [] if ops is None else [w for w in ops.parameters(module) if named(f"{name}.{w}")]
    if ops is None or not (single or adaptable(module)):
        problems.append(
            f"{name}: expected a layer whose weight can be adapted, got {type(module).__name__}"
        )
        return
    layout = layout_for(ops, module, config.get("peft_version"))
    reading.notes += [f"{name}: {note}" for note in [layout.note] if note]
    try:
        weights = layout.weights_by_path(places, single)
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return
    for place, found in places.items():
        parameter = weights[place]
        site = Site(module, parameter, join(prefix, name), ops, storage_of(module, parameter))
        reason = layout.refusal(parameter) or fmt.refusal(layout)
        if reason:
            problems.append(f"{site.label}: {reason}; exclude the layer")
            continue
        entry = HFEntry(name, site, layout, None, {}, by_weight=parameter in single)
        _add_tensors(entry, fmt, found, problems)
        reading.entries.append(entry)


def _no_change(places: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return all(any(not t.any() for t in found.values()) for found in places.values())


def _add_tensors(
    entry: HFEntry, fmt: HFFormat, found: Mapping[str, Tensor], problems: list[str]
) -> None:
    """Give the entry the file's tensors under our names, in canonical axes."""
    ours = {fmt.name(entry, name): name for name in fmt.tensors}
    for theirs, tensor in found.items():
        name = ours.get(theirs)
        if name is None:
            kind = type(entry.site.module).__name__
            problems.append(f"{entry.path}.{theirs}: no such tensor on {kind}")
            continue
        entry.shapes[theirs] = tuple(tensor.shape)
        axes = fmt.axes.get(name, "")
        try:
            entry.tensors[name] = entry.layout.from_peft(entry.site.parameter, axes, tensor)
        except (ValueError, RuntimeError) as error:
            problems.append(f"{entry.path}.{theirs}: {error}")
    entry.tensors = fmt.oriented(entry)
