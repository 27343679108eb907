"""Writing a Hugging Face peft directory, driven by the exchange table of each method.

Adapters that peft would compute differently are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.intact import check_intact
from lightning_peft.core.modules import is_conv1d, tied_modules
from lightning_peft.core.names import in_adapter, join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.core.site import Site
from lightning_peft.hf.attention_prompts import add_attention_prompts
from lightning_peft.hf.config import base_config
from lightning_peft.hf.files import BATCHES, write_adapter, write_tensors
from lightning_peft.hf.hub import upload
from lightning_peft.hf.keys import bias_key, tensor_prefix
from lightning_peft.hf.layouts import layout_for
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
from lightning_peft.hf.targets import compact, misread_names, model_root
from lightning_peft.hf.token_rows import add_token_rows
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.prompt.adapter import PromptAdapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import (
    HFEntry,
    HFFormat,
    Method,
    SequenceMethod,
    WeightMethod,
)
from lightning_peft.methods.modules_to_save import ModulesToSave, TrainedBias
from lightning_peft.methods.norm_tuning import NormTuning
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.storage import storage_for, storage_of

__all__ = ["save_adapter"]

#: (name of the module in the exported model, module, adapter)
_Found = list[tuple[str, nn.Module, Adapter]]


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
    original base.

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
    found, outside = _adapters(model, adapter_name, strip_compile(prefix))
    method, fmt = _one_method(found)
    apart = TrainableTokens | NormTuning
    weights = [each for each in found if not isinstance(each[2].method, apart)]
    entries = _entries(weights, method, fmt, misread_names(top, fmt))
    config = _config(top, method, fmt, entries, uniform=uniform)
    if fmt.tensors:
        _name_targets(top, entries, config)
        if fmt.shares_by_target and isinstance(config["target_modules"], str):
            raise ValueError(
                f"save_adapter: expected layers that a list of names selects, since peft's "
                f"{fmt.peft_type} shares tensors by entry of the list, got "
                f"{config['target_modules']!r}; keep the adapter with adapter_state_dict()"
            )
    tensors = _file_tensors(fmt, entries)
    _add_shared(found, fmt, entries, config, tensors)
    _add_biases(found, tensors)
    add_token_rows(top, found, method, config, tensors)
    add_norm_layers(top, found, config, tensors)
    add_attention_prompts(found, config, tensors)
    _add_saved(model, top, found, fmt, adapter_name, strip_compile(prefix), config, tensors)
    if isinstance(method, SequenceMethod):
        add_heads(top, fmt, config, tensors)
    if names == "legacy":
        config, tensors = legacy_names(top, fmt, config, tensors)
    target = Path(directory) / ("" if adapter_name == "default" else adapter_name)
    metadata = provenance_of(model, adapter_name, strip_compile(prefix))
    outside += trained_outside(model)
    warn_of_left_out(model, adapter_name, outside)
    if outside:
        write_tensors(target / OUTSIDE, *outside_tensors(model, outside, adapter_name))
    card = model_card(top, method, config, _storage_label(model, adapter_name), metrics or {})
    write_adapter(target, config, tensors, card, metadata)
    if push_to_hub is not None:
        upload(target, push_to_hub)
    return target


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
    config.update(fmt.fixed)
    if uniform and fmt.uniform is None:
        raise ValueError(
            f"save_adapter(uniform=True): expected a method with ranks, got {method.label}"
        )
    finish = fmt.uniform if uniform else fmt.to_config
    if finish is not None:
        finish(entries, config)
    return config


def _adapters(model: nn.Module, adapter_name: str, prefix: str) -> tuple[_Found, list[str]]:
    """The adapters inside `prefix`, and the trained modules outside of it."""
    known = sorted({n for _, _, r in registries_in(model) for n in r.adapters})
    if adapter_name not in known:
        if any(adapters_of(m, adapter_name) for _, m in adapted_modules(model)):
            raise KeyError(
                f"save_adapter: expected the module that adapter {adapter_name!r} was attached to, "
                f"got a part of it ({type(model).__name__}); give the whole (with the callback the "
                f"LightningModule) and name this part with root="
            )
        raise KeyError(
            f"save_adapter: expected one of the attached adapters {known}, got {adapter_name!r}; "
            f"give adapter_name={known[0]!r}"
            if known
            else "save_adapter: expected a model with adapters, got one without; attach one first"
        )
    found: _Found = []
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


def _one_method(found: _Found) -> tuple[Method, HFFormat]:
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


def _entries(
    found: _Found, method: Method, fmt: HFFormat, misread: Collection[str]
) -> list[HFEntry]:
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
                f"save_adapter: {method.label} on {site.label!r} has no equal in peft: {reason}; "
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


def _name_targets(top: nn.Module, entries: list[HFEntry], config: dict[str, Any]) -> None:
    modules: set[str] = set()
    parameters: set[str] = set()
    for e in entries:
        (parameters if e.by_weight else modules).add(e.target)
    if modules or parameters:
        config["target_modules"] = compact(top, modules) if modules else None
    if parameters:
        config["target_parameters"] = sorted(parameters)
        _check_target_parameters(config, sorted(parameters))
        _check_recurrent_biases(config, entries)
    if "fan_in_fan_out" in config:  # peft's word for GPT-2's [in, out] weights
        config["fan_in_fan_out"] = any(is_conv1d(e.site.module) for e in entries)


def _check_target_parameters(config: dict[str, Any], names: list[str]) -> None:
    """Check that peft's wrapper of a single weight can hold the adapter; drop the dropout.

    Raises:
        ValueError: the method is not LoRA, or it is DoRA, or B has a bias.
    """
    other = config["peft_type"] != "LORA"
    for key in ("use_dora", "lora_bias", *(["peft_type"] if other else [])):
        if config.get(key):
            raise ValueError(
                "save_adapter: expected layers that peft adapts as modules under "
                f"{key}={config[key]}, got {names[:3]}, which it adapts as single weights, by "
                "plain LoRA only; exclude them (exclude_modules), or keep the adapter with "
                "adapter_state_dict()"
            )
    if config.get("lora_dropout"):
        config["lora_dropout"] = 0.0


def _check_recurrent_biases(config: Mapping[str, Any], entries: list[HFEntry]) -> None:
    recurrent = [e.path for e in entries if e.layout.kind == "recurrent"]
    if recurrent and config.get("bias", "none") != "none":
        raise ValueError(
            f"save_adapter: {recurrent[0]!r}: expected bias='none' next to a recurrent layer, got "
            f"bias={config['bias']!r}: peft 0.21 takes its switch for biases for a tensor and "
            "cannot read the file; keep the adapter with adapter_state_dict()"
        )


def _places(entries: list[HFEntry]) -> dict[int, dict[str, str]]:
    """Return the path below the module of every weight, by the module's id."""
    adapted: dict[int, list[HFEntry]] = {}
    for e in entries:
        adapted.setdefault(id(e.site.module), []).append(e)
    return {
        key: group[0].layout.nested_paths([e.site.parameter for e in group])
        for key, group in adapted.items()
    }


def _file_tensors(fmt: HFFormat, entries: list[HFEntry]) -> dict[str, Tensor]:
    places = _places(entries)
    tensors: dict[str, Tensor] = {}
    for e in entries:
        parameter = e.site.parameter
        head = tensor_prefix(e.path, places[id(e.site.module)].get(parameter, ""))
        for name, tensor in fmt.oriented(e).items():
            key = f"{head.removesuffix('.')}.{fmt.name(e, name)}"
            tensors[key] = e.layout.to_peft(parameter, fmt.axes.get(name, ""), tensor)
    return tensors


def _add_shared(
    found: _Found,
    fmt: HFFormat,
    entries: list[HFEntry],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
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


def _add_biases(found: _Found, tensors: dict[str, Tensor]) -> None:
    adapted: dict[int, list[str]] = {}
    for _, module, adapter in found:
        if isinstance(adapter, WeightAdapter):
            adapted.setdefault(id(module), []).append(adapter.site.parameter)
    for path, module, adapter in found:
        if isinstance(adapter.method, TrainedBias):
            for bias, value in adapter.copies().items():
                tensors[bias_key(module, path, bias, adapted.get(id(module), ()))] = value


def _add_saved(
    model: nn.Module,
    top: nn.Module,
    found: _Found,
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


def _copies_are_tied(top: nn.Module, found: _Found) -> bool:
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
