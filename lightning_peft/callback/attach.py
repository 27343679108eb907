"""Attaches adapters inside a run: idempotent, on the module or on the part that `root` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.adapters.activation import activate
from lightning_peft.adapters.attach import attach_within
from lightning_peft.adapters.attach_checks import resolve_methods
from lightning_peft.adapters.detach import detach
from lightning_peft.adapters.quantize import students_of_dense
from lightning_peft.adapters.rehome import rehome
from lightning_peft.callback.init_from import continue_adapter
from lightning_peft.core.names import matches_suffix
from lightning_peft.core.registry import AdapterRegistry, forget, registries_in, registry_of
from lightning_peft.hf.base_copies import Embeddings
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.methods.base import Method
from lightning_peft.methods.registry import to_dict
from lightning_peft.models.frozen_parts import frozen_copies, inside
from lightning_peft.models.modules import fresh_head_names
from lightning_peft.storage import StorageConfig

_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

__all__ = ["attach_once", "averaged_parts", "find_root"]


def find_root(module: nn.Module, path: str | None) -> nn.Module:
    """The submodule at a dotted path; the module itself for None.

    Raises:
        ValueError: no such submodule, with the ones there are.
    """
    if not path:
        return module
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        known = [n for n, _ in module.named_modules() if n and n.count(".") <= path.count(".")]
        raise ValueError(
            f"PEFT root: expected the path of a submodule, got {path!r}; there are {known[:20]}"
        ) from error


def averaged_parts(
    module: nn.Module, path: str | None, quantization: StorageConfig | None
) -> dict[str, str]:
    """Return parts of the root that are averaged into a dense copy outside of it.

    Args:
        module: The module that holds both.
        path: Path of the root.
        quantization: How the base is stored.
    """
    if not path:
        return {}
    found = students_of_dense(frozen_copies(module), quantization)
    return {
        student.removeprefix(path).removeprefix("."): teacher
        for student, teacher in found.items()
        if inside(student, [path])
    }


def attach_once(
    root: nn.Module,
    adapters: Mapping[str, Sequence[Method]],
    *,
    quantization: StorageConfig | None,
    modules_to_save: Sequence[str] | None,
    device: torch.device,
    keep_on: torch.device | None,
    lost: bool,
    averaged: Mapping[str, str],
    init_from: str | Path | None = None,
    embeddings: Embeddings = "check",
    separate_copies: bool = False,
) -> list[str]:
    """Attach every adapter that is not attached yet, and make all of them act, in the order named.

    Args:
        root: What to adapt.
        adapters: Methods by adapter name.
        quantization: How to store the base.
        modules_to_save: Modules to train fully, besides a Hugging Face classification head; None
            for the new layers next to a pretrained model, an empty sequence for none.
        device: Where to quantise.
        keep_on: Where packed layers are kept; None for `device`. A model that is sharded later is
            not complete on any device.
        lost: Whether the user's `configure_model` replaced adapted layers.
        averaged: Parts of the root that are averaged into a dense part outside, with its name.
        separate_copies: As in `attach`.
        init_from: Directory or hub id of an adapter to go on from, instead of methods.
        embeddings: What to do with the embeddings in that directory, as in `load_adapter`.

    Returns:
        Names of adapters whose layers were replaced, and which start again.

    Raises:
        RuntimeError: an adapter of that name is attached with another configuration.
    """
    rehome(root)
    record = registry_of(root)
    gone = _lost_adapters(root, record, lost) if record is not None else []
    new = False
    for name, methods in adapters.items():
        holder = _holder(root, name)
        if holder is not None:
            if init_from is None:
                _same(name, holder, resolve_methods(methods, root), quantization)
            continue
        record = registry_of(root)
        first = record is None or record.fingerprint is None
        if not first and record is not None and quantization not in (None, record.quantization):
            raise RuntimeError(
                f"PEFT adapter {name!r}: expected quantization={record.quantization}, as the base "
                f"is stored already, got {quantization}; give every PEFT callback of one root the "
                "same"
            )
        unfinished = record is not None and not record.adapters  # a former call failed halfway
        how: dict[str, Any] = {
            "adapter_name": name,
            "quantization": quantization if first or unfinished else None,
            "modules_to_save": _saved(root, modules_to_save),
            "device": device if first and quantization is not None else None,
        }
        if init_from is None:
            how["separate_copies"] = separate_copies
            attach_within(root, list(methods), averaged=averaged, keep_on=keep_on, **how)
        else:
            continue_adapter(root, init_from, embeddings=embeddings, **how)
        new = True
    record = registry_of(root)
    if new and record is not None:
        activate(root, record, list(record.adapters))
    return gone


def _holder(root: nn.Module, name: str) -> AdapterRegistry | None:
    """Return the registry of an adapter: of the root, or of a net inside that has it already."""
    return next((r for _, _, r in registries_in(root) if name in r.adapters), None)


def _saved(root: nn.Module, given: Sequence[str] | None) -> list[str] | None:
    """The modules given, and the heads that a Hugging Face model starts at random."""
    if not given:
        return None if given is None else []
    return [*given, *(h for h in fresh_head_names(root) if not _covered(h, given))]


def _covered(head: str, wanted: Sequence[str]) -> bool:
    return matches_suffix(head, wanted) or head.startswith(tuple(f"{w}." for w in wanted))


def _lost_adapters(root: nn.Module, record: AdapterRegistry, lost: bool) -> list[str]:
    """Names whose layers the user's `configure_model` replaced; their record goes."""
    live = {name for _, module in adapted_modules(root) for name in module.peft}
    gone = [name for name in record.adapters if lost or name not in live]
    if gone:
        detach(root)
        forget(root)  # a quantised base went with the old net
    return gone


def _same(
    name: str,
    record: AdapterRegistry,
    methods: Sequence[Method],
    quantization: StorageConfig | None,
) -> None:
    entry = record.adapters[name]
    chooses = any(getattr(m, field, None) is not None for m in methods for field in _CHOICE)
    drop = () if chooses else _CHOICE  # an adapter that was loaded keeps the layers it was made for
    have, want = [_settings(m, drop) for m in entry.methods], [_settings(m, drop) for m in methods]
    if have != want or (quantization is not None and quantization != record.quantization):
        raise RuntimeError(
            f"PEFT adapter {name!r}: expected the configuration that is attached already, "
            f"{_short(have)} on {record.quantization}, got {_short(want)} on {quantization}; "
            "detach(module) first, use another adapter_name, or give PEFT(init_from=directory) to "
            "go on training a saved adapter"
        )


def _settings(method: Method, drop: Sequence[str]) -> dict[str, Any]:
    return {k: v for k, v in to_dict(method).items() if k not in drop}


def _short(methods: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join(f"{m['method']}({_fields(m)})" for m in methods)


def _fields(method: Mapping[str, Any]) -> str:
    said = {k: v for k, v in method.items() if k != "method" and v not in (None, {})}
    return ", ".join(f"{k}={v!r}" for k, v in said.items())
