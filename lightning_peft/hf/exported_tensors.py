"""Tensors of the file that `save_adapter` writes, under the names that peft reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import tied_modules
from lightning_peft.core.names import in_adapter, join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.hf.exported_adapters import FoundAdapters
from lightning_peft.hf.files import BATCHES
from lightning_peft.hf.keys import bias_key, tensor_prefix
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import (
    HFEntry,
    HFFormat,
)
from lightning_peft.methods.modules_to_save import ModulesToSave, TrainedBias

__all__ = ["add_biases", "add_saved_modules", "add_shared", "file_tensors"]


def _places(entries: list[HFEntry]) -> dict[int, dict[str, str]]:
    """Return the path below the module of every weight, by the module's id."""
    adapted: dict[int, list[HFEntry]] = {}
    for e in entries:
        adapted.setdefault(id(e.site.module), []).append(e)
    return {
        key: group[0].layout.nested_paths([e.site.parameter for e in group])
        for key, group in adapted.items()
    }


def file_tensors(fmt: HFFormat, entries: list[HFEntry]) -> dict[str, Tensor]:
    """Return the tensors of adapted weights under peft's names, in peft's orientation."""
    places = _places(entries)
    tensors: dict[str, Tensor] = {}
    for e in entries:
        parameter = e.site.parameter
        head = tensor_prefix(e.path, places[id(e.site.module)].get(parameter, ""))
        for name, tensor in fmt.oriented(e).items():
            key = f"{head.removesuffix('.')}.{fmt.name(e, name)}"
            tensors[key] = e.layout.to_peft(parameter, fmt.axes.get(name, ""), tensor)
    return tensors


def add_shared(
    found: FoundAdapters,
    fmt: HFFormat,
    entries: list[HFEntry],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Add tensors that several layers share, and those of prompts."""
    if fmt.pack_shared is not None:
        own = {k: t for _, _, a in found for k, t in a.tensors().items() if k in fmt.prefix}
        tensors |= fmt.pack_shared(entries, own, config)
        return
    for _, _, adapter in found:
        own = adapter.tensors()
        if isinstance(adapter, PromptAdapter):
            with torch.no_grad():
                own = {**own, "P": adapter.prompt_embeddings().cpu()}
            own = dict(fmt.pack(adapter.method, adapter.site, own)) if fmt.pack else own
        for name, tensor in own.items():
            if name not in fmt.prefix:
                continue
            key = fmt.prefix[name]
            rows = enumerate(tensor) if "{i}" in key else [(0, tensor)]
            tensors |= {key.format(i=i): row.detach() for i, row in rows}


def add_biases(found: FoundAdapters, tensors: dict[str, Tensor]) -> None:
    """Add the biases that were trained, under the keys that peft reads."""
    adapted: dict[int, list[str]] = {}
    for _, module, adapter in found:
        if isinstance(adapter, WeightAdapter):
            adapted.setdefault(id(module), []).append(adapter.site.parameter)
    for path, module, adapter in found:
        if isinstance(adapter.method, TrainedBias):
            for bias, value in adapter.copies().items():
                tensors[bias_key(module, path, bias, adapted.get(id(module), ()))] = value


def add_saved_modules(
    model: nn.Module,
    top: nn.Module,
    found: FoundAdapters,
    fmt: HFFormat,
    adapter_name: str,
    prefix: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Add trained modules, and those that peft takes for trained: it matches names by ending."""
    names: list[str] = []
    for at, _, record in registries_in(model):
        entry = record.adapters.get(adapter_name)
        for name in entry.modules_to_save if entry is not None else ():
            full = strip_compile(join(at, name))
            if not prefix or f"{full}.".startswith(f"{prefix}."):
                names.append(full[len(prefix) :].removeprefix("."))
    if not names:
        return
    if not fmt.saves_modules:
        raise ValueError(
            f"save_adapter: expected no modules_to_save, which peft's {fmt.peft_type} does not "
            f"have, got {sorted(names)}; attach LoRA with trainable_token_indices, or keep the "
            "adapter with adapter_state_dict()"
        )
    config["modules_to_save"] = sorted(names)
    for name, module in top.named_modules():
        inside = any(name.startswith(f"{n}.") for n in names) or in_adapter(name)
        if inside or not name.endswith(tuple(names)):
            continue
        for key, value in module.state_dict().items():
            counts = key.rpartition(".")[2] == BATCHES
            if (value.is_floating_point() or counts) and not in_adapter(key):
                tensors[fmt.saved_prefix + join(name, key)] = value
    for path, _, adapter in found:
        if isinstance(adapter.method, ModulesToSave):
            for parameter, value in adapter.substitutes().items():
                tensors[fmt.saved_prefix + join(path, parameter)] = value
    if fmt.peft_type == "LORA" and _copies_are_tied(top, found):
        config["ensure_weight_tying"] = True


def _copies_are_tied(top: nn.Module, found: FoundAdapters) -> bool:
    """Whether modules tied to the input embedding share one trained copy, all of them.

    peft ties them again only then, and if it knows one of their names.
    """
    copies: dict[int, set[str]] = {}
    for path, _, adapter in found:
        if isinstance(adapter.method, ModulesToSave) and "weight" in adapter.copies():
            copies.setdefault(id(adapter.copies()["weight"]), set()).add(path)
    tied = [set(group) for group in tied_modules(top)]
    return any(
        paths in tied and {p.rpartition(".")[2] for p in paths} & {"embed_tokens", "lm_head"}
        for paths in copies.values()
    )
