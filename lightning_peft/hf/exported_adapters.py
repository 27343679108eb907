"""Adapters, method and exchange entries that a Hugging Face peft directory is written from."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lightning_peft.core.names import join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.core.site import Site
from lightning_peft.core.value_types import shown
from lightning_peft.hf.layouts import layout_for
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import (
    HFEntry,
    HFFormat,
    Method,
    WeightMethod,
)
from lightning_peft.methods.modules_to_save import ModulesToSave, TrainedBias
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.storage import storage_of

__all__ = ["FoundAdapters", "exchange_entries", "exported_method", "find_adapters"]

#: (name of the module in the exported model, module, adapter)
FoundAdapters = list[tuple[str, nn.Module, Adapter]]


def find_adapters(
    model: nn.Module, adapter_name: str, prefix: str
) -> tuple[FoundAdapters, list[str]]:
    """Return the adapters inside `prefix`, and the names of trained modules outside of it.

    Raises:
        KeyError: no adapter of that name, or only a part of the module that it was attached to.
        ValueError: layers of the adapter outside of `prefix`.
    """
    known = sorted({n for _, _, r in registries_in(model) for n in r.adapters})
    if adapter_name not in known:
        if any(adapters_of(m, adapter_name) for _, m in adapted_modules(model)):
            raise KeyError(
                f"save_adapter: expected the module that adapter {adapter_name!r} was attached to, "
                f"got a part of it ({type(model).__name__}); give the whole (with the callback the "
                f"LightningModule) and name this part with root="
            )
        raise KeyError(
            f"save_adapter: expected one of the attached adapters {known}, got "
            f"{shown(adapter_name)}; give adapter_name={known[0]!r}"
            if known
            else "save_adapter: expected a model with adapters, got one without; attach one first"
        )
    found: FoundAdapters = []
    for name, module in adapted_modules(model):
        path = strip_compile(name)
        inside = not prefix or path == prefix or path.startswith(f"{prefix}.")
        for adapter in adapters_of(module, adapter_name):
            if not inside and isinstance(adapter.method, ModulesToSave):
                continue
            if not inside:
                raise ValueError(
                    f"save_adapter: expected all layers of adapter {adapter_name!r} inside "
                    f"{prefix!r}, found {path!r}; name the module that holds them all with "
                    "root=, for instance root='' for the model itself"
                )
            found.append((path[len(prefix) :].removeprefix("."), module, adapter))
    return found, _outside(model, adapter_name, prefix)


def _outside(model: nn.Module, adapter_name: str, prefix: str) -> list[str]:
    """Trained modules outside of the module whose names the file uses."""
    names = [
        strip_compile(join(at, name))
        for at, _, registry in registries_in(model)
        if adapter_name in registry.adapters
        for name in registry.adapters[adapter_name].modules_to_save
    ]
    return [n for n in names if prefix and not f"{n}.".startswith(f"{prefix}.")]


def exported_method(found: FoundAdapters) -> tuple[Method, HFFormat]:
    """Return the one method of the adapters, and its exchange format.

    Raises:
        ValueError: several methods, or one that peft does not have.
    """
    methods: list[Method] = []
    has_tokens = any(
        isinstance(a.method, WeightMethod) and a.method.trained_tokens() is not None
        for _, _, a in found
    )
    for _, _, adapter in found:
        helper = isinstance(adapter.method, ModulesToSave | TrainedBias) or (
            has_tokens and isinstance(adapter.method, TrainableTokens)
        )
        if not helper and adapter.method not in methods:
            methods.append(adapter.method)
    labels = [m.label for m in methods]
    if len(methods) != 1:
        raise ValueError(
            f"save_adapter: expected one method, got {labels or 'trained modules alone'}; a peft "
            "directory holds exactly one: keep ours with adapter_state_dict(), or merge() and "
            "save the model"
        )
    if methods[0].hf is None:
        raise ValueError(
            f"save_adapter: expected a method that peft has too, got {labels[0]}; keep it with "
            "adapter_state_dict(), or merge() and save the model"
        )
    return methods[0], methods[0].hf


def exchange_entries(
    found: FoundAdapters, method: Method, fmt: HFFormat, misread: Collection[str]
) -> list[HFEntry]:
    """Return one entry per adapted weight, with its tensors as the method packs them.

    Args:
        found: The adapters.
        method: The exported method.
        fmt: Its exchange format.
        misread: Last parts of names that peft would match on other modules too.

    Raises:
        ValueError: a layer that peft cannot hold, or computes differently.
    """
    entries = []
    for path, module, adapter in found:
        if adapter.method != method:
            continue
        site = adapter.site
        layout = layout_for(site.ops, module)
        reason = layout.refusal(site.parameter) if isinstance(adapter, WeightAdapter) else ""
        if isinstance(adapter, WeightAdapter):
            reason = reason or fmt.refusal(layout)
        reason = reason or (fmt.refuse(method, site) if fmt.refuse is not None else "")
        if reason:
            raise ValueError(
                f"save_adapter: {method.label} on {site.quoted} has no equal in peft: {reason}; "
                "exclude the layer, or keep the adapter with adapter_state_dict()"
            )
        own = {
            k: t.detach().cpu()
            for k, t in adapter.tensors().items()
            if isinstance(adapter, WeightAdapter) and k not in fmt.prefix and k not in fmt.unwritten
        }
        packed = own if fmt.pack is None or not own else fmt.pack(method, site, own)
        by_weight = layout.is_target_parameter(site.parameter) or (
            path.rpartition(".")[2] in misread and site.parameter == "weight"
        )
        entries.append(
            HFEntry(path, site, layout, method, dict(packed), own=own, by_weight=by_weight)
        )
    return [*entries, *_unchanged_weights(entries)]


def _unchanged_weights(entries: list[HFEntry]) -> list[HFEntry]:
    """Changes of 0 for the other weights of modules that peft adapts as a whole."""
    by_module: dict[int, list[HFEntry]] = {}
    for e in entries:
        if e.layout.adapts_all_weights:
            by_module.setdefault(id(e.site.module), []).append(e)
    found = []
    for group in by_module.values():
        (e, *_), have = group, {each.site.parameter for each in group}
        for weight in e.site.ops.parameters(e.site.module):
            if weight in have:
                continue
            storage = storage_of(e.site.module, weight)
            site = Site(e.site.module, weight, e.site.name, e.site.ops, storage)
            r = e.tensors["A"].shape[0]
            tensors = {
                "A": torch.zeros(r, site.in_features),
                "B": torch.zeros(site.out_features, r),
            }
            if "bias_B" in e.tensors:
                tensors["bias_B"] = torch.zeros(site.out_features)
            found.append(HFEntry(e.path, site, e.layout, e.method, tensors, own=tensors))
    return found
