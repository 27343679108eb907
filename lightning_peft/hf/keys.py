"""Keys of adapter_model.safetensors: from a place in the model to the file, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.placement.weights import adaptable
from lightning_peft.core.site import Site
from lightning_peft.layers import ops_for
from lightning_peft.methods.base import HFEntry, HFFormat
from lightning_peft.models.target_modules import bypassed
from lightning_peft.storage import storage_of

__all__ = ["PREFIX", "Reading", "bias_key", "joined", "plain", "tensor_prefix"]

PREFIX = "base_model.model."


def joined(*parts: str) -> str:
    """Names joined by dots; empty ones left out."""
    return ".".join(part for part in parts if part)


def plain(name: str) -> str:
    """A module's name without the wrapper of torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def tensor_prefix(path: str, place: str) -> str:
    """What stands before a tensor's own name: the module, and where inside peft's wrapper."""
    return PREFIX + joined(path, place)


def bias_key(module: nn.Module, path: str, bias: str, adapted: Iterable[str]) -> str:
    """Key of a trained bias: behind ``base_layer`` where its weight is adapted."""
    weights = list(adapted)
    ops = ops_for(module)
    if ops is not None:
        places = ops.hf_places(module, weights)
        for name, place in places.items():
            if ops.bias(module, name) == bias:
                return PREFIX + joined(path, place, "base_layer", bias.rpartition(".")[2])
    return PREFIX + joined(path, bias)


@dataclass
class Reading:
    """The tensors of a file, sorted by what they are.

    Attributes:
        entries: Adapted weights.
        shared: Tensors that stand once for the model, by our names.
        other: Everything else: trained copies, biases, copies of the base.
        notes: What was left out, and why that is right.
    """

    entries: list[HFEntry] = field(default_factory=list)
    shared: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_keys(
    fmt: HFFormat, tensors: Mapping[str, Tensor], top: nn.Module, prefix: str, saved: Iterable[str]
) -> Reading:
    """Sort a file's tensors by place in the model.

    Args:
        fmt: The method's table.
        tensors: As in the file, in current layer names.
        top: The module whose names the file uses.
        prefix: Its name in the caller's model.
        saved: ``modules_to_save`` of the config.

    Raises:
        ValueError: tensors for a module that is not there or cannot hold them, with the list.
    """
    reading = Reading()
    groups = _groups(fmt, tensors, top, tuple(saved), reading)
    modules = dict(top.named_modules())
    unknown = sorted(p for p in groups if _split(p, modules)[0] not in modules)
    if unknown:
        raise ValueError(
            f"adapter file: expected modules of {type(top).__name__}, got tensors for "
            f"{len(unknown)} others, as {unknown[:3]}; the first modules here are "
            f"{[n for n, m in modules.items() if adaptable(m)][:3]}; is this the right base model?"
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
        _read_module(fmt, name, modules[name], places, prefix, reading, problems)
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
    """Path in the file → tensors by their names; the rest goes to `into`."""
    suffixes = sorted({*fmt.tensors.values(), *fmt.lookup.values()}, key=len, reverse=True)
    whole = {theirs: ours for ours, theirs in fmt.prefix.items()}
    own = {n for n, _ in top.named_parameters()} if saved else set()
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        rest = key.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if rest.endswith(f".{s}") or rest == s), None)
        if key in whole:
            into.shared[whole[key]] = tensor
        elif not key.startswith(PREFIX) or suffix is None or rest in own:
            into.other[key] = tensor
        else:
            groups.setdefault(rest[: -len(suffix)].removesuffix("."), {})[suffix] = tensor
    return groups


def _split(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """(module, place below it): a place starts with peft's ``base_layer``."""
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
    reading: Reading,
    problems: list[str],
) -> None:
    ops = ops_for(module)
    if ops is None or not adaptable(module):
        problems.append(
            f"{name}: expected a layer whose weight can be adapted, got {type(module).__name__}"
        )
        return
    try:
        weights = ops.hf_found(module, places)
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return
    for place, found in places.items():
        parameter = weights[place]
        site = Site(module, parameter, joined(prefix, name), ops, storage_of(module, parameter))
        reason = ops.hf_refusal(module, parameter)
        if reason:
            problems.append(f"{site.label}: {reason}; exclude the layer")
            continue
        reading.entries.append(_entry(fmt, name, site, found, problems))


def _no_change(places: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return all(any(not t.any() for t in found.values()) for found in places.values())


def _entry(
    fmt: HFFormat, path: str, site: Site, found: Mapping[str, Tensor], problems: list[str]
) -> HFEntry:
    ours = {fmt.name(site, name): name for name in fmt.tensors}
    entry = HFEntry(path, site, None, {})
    for theirs, tensor in found.items():
        name: Any = ours.get(theirs)
        if name is None:
            problems.append(f"{path}.{theirs}: no such tensor on {type(site.module).__name__}")
            continue
        entry.shapes[theirs] = tuple(tensor.shape)
        try:
            layout = fmt.layouts.get(name, "")
            entry.tensors[name] = site.ops.hf_unpack(site.module, site.parameter, layout, tensor)
        except (ValueError, RuntimeError) as error:
            problems.append(f"{path}.{theirs}: {error}")
    entry.tensors = fmt.oriented(site, entry.tensors)
    return entry
