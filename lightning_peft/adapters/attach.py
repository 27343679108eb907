"""Attach: changes any `nn.Module` in place.

All checks run before the first change. Base keys never change; an adapter is stored as
`<module>.peft.<adapter name>.<tensor>`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_peft.adapters.activation import activate
from lightning_peft.adapters.adoption import adopted_layers
from lightning_peft.adapters.batch import observe_batch, stack_of
from lightning_peft.adapters.build import AdapterBuilder, guard_fast_path
from lightning_peft.adapters.followers import can_follow, follow
from lightning_peft.adapters.new_layers import new_layers_of
from lightning_peft.adapters.placement.placement import PlannedAdapter
from lightning_peft.adapters.placement.unused_rules import check_patterns, unused_rules
from lightning_peft.adapters.plan import plan_attach
from lightning_peft.adapters.quantize import (
    PackingWatch,
    QuantizationPlan,
    plan_quantization,
    quantize_layers,
    students_of_dense,
)
from lightning_peft.adapters.rehome import rehome
from lightning_peft.adapters.snapshot import ModelSnapshot
from lightning_peft.core.names import in_adapter, matches_suffix, nearest_names
from lightning_peft.core.registry import (
    AdapterEntry,
    AdapterRegistry,
    ensure_registry,
    join_registry,
    registries_in,
    registry_of,
    set_registry,
)
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.projection_group import share_inputs
from lightning_peft.layers.weight_adapter import WeightAdapter, initial_shared
from lightning_peft.methods.arguments import require_methods
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.models.fingerprint import fingerprint
from lightning_peft.models.frozen_parts import FrozenCopy, frozen_copies, inside
from lightning_peft.models.history import start_history
from lightning_peft.models.pretrained import NewLayers
from lightning_peft.models.shared_inputs import children_sharing_input
from lightning_peft.models.target_modules import feedforward_targets
from lightning_peft.report.summary import Report, parameter_report
from lightning_peft.storage import StorageConfig, as_config, require_config

__all__ = [
    "attach",
    "attach_within",
    "check_adapter_name",
    "quantize",
    "reset_adapters",
    "resolve_methods",
]


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    adapter_name: str = "default",
    quantization: StorageConfig | str | None = None,
    modules_to_save: Sequence[str] | None = (),
    device: torch.device | str | None = None,
) -> Report:
    """Freeze the model, quantise it if asked, and attach an adapter in place.

    Args:
        model: Any module; a Hugging Face model, a LightningModule, or one layer.
        method: One method, or several as a hybrid under one name (applied in this order).
        adapter_name: Letters, digits, ``_`` and ``-``.
        quantization: Quantise the frozen linear layers, one at a time: ``"nf4"``, or a
            configuration.
        modules_to_save: Names or suffixes of modules that are trained fully. None finds the new
            layers next to a pretrained model, as the callback does.
        device: Where to quantise; the weights stay there. None means where each weight is.

    Returns:
        The report of what matched and what it costs.

    Raises:
        ValueError: a bad name, nothing matches, a method has no meaning at a layer, non-finite
            weights.
        RuntimeError: the name is taken, or adapters are merged.

    Whatever is raised, the model is as before, bit for bit. With `quantization`, layers that were
    packed before a failure stay packed; a second call packs the rest.
    """
    return attach_within(
        model,
        method,
        adapter_name=adapter_name,
        quantization=as_config(quantization),
        modules_to_save=modules_to_save,
        device=device,
    )


def attach_within(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    adapter_name: str,
    quantization: StorageConfig | None,
    modules_to_save: Sequence[str] | None,
    device: torch.device | str | None,
    averaged: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    """`attach` for a part of a larger module.

    Args:
        model: As in `attach`; so are the other arguments.
        averaged: Parts of the model that are averaged into a dense part outside, with its name.
    """
    new = NewLayers()
    if modules_to_save is None:
        new = new_layers_of(model, method)
        modules_to_save = list(new.trained)
    methods = _checked_methods(model, method, modules_to_save)
    snapshot, built, packed = ModelSnapshot(model), list[WeightAdapter](), list[str]()
    try:
        rehome(model)
        _check_name(model, adapter_name)
        with adopted_layers(model):
            saved = _saved_modules(model, modules_to_save)
            plan = plan_attach(model, methods, saved)
            copies = _copies_to_follow(model, plan.adapters)
            averaged = {**averaged, **students_of_dense(copies, quantization)}
            packing = (
                None
                if quantization is None
                else plan_quantization(model, quantization, keep=saved, averaged=averaged)
            )
            _check_copies_stay_dense(plan.adapters, packing)
            unused = unused_rules(model, methods, plan.adapters)
            readers = [m for m in methods if isinstance(m, WeightMethod) and m.reads_batch]
            observed = [(m, stack_of(model, m)) for m in readers]
        for line in unused:
            warnings.warn(line, stacklevel=3)
        registry = ensure_registry(model)
        _remember_base(model, registry, plan.adapters)
        builder = AdapterBuilder(plan.adapters, adapter_name, built)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if packing is not None:
            watch = PackingWatch(packed, snapshot.renew, builder.around_packing)
            quantize_layers(model, packing, device, watch)
            registry.quantization, registry.dense = quantization, packing.dense
        builder.finish()
        for reader, stack in observed:
            observe_batch(model, reader, stack, adapter_name)
        for pair in copies:
            student = model.get_submodule(pair.student)
            if can_follow(student):
                follow(student, model.get_submodule(pair.teacher), adapter_name)
        guard_fast_path(model)
        share_inputs(model, children_sharing_input(model))
        for _, module in adapted_modules(model):
            join_registry(module, registry)
        registry.adapters[adapter_name] = _entry(methods, saved, plan.adapters, new.trained)
        registry.user_frozen, registry.loose = new.frozen, new.loose
        registry.skipped, registry.tied = plan.skipped, plan.tied
        activate(model, registry, [adapter_name])
        start_history(model, again=packed)
        return parameter_report(model)
    except BaseException:
        base = registry_of(model)
        snapshot.restore(built)
        if packed and base is not None:  # packed layers stay packed: their dense weights are gone
            set_registry(model, _registry_of_packed(base, quantization))
        raise


def _registry_of_packed(
    registry: AdapterRegistry, quantization: StorageConfig | None
) -> AdapterRegistry:
    """Return what is known of a base that was packed in part; a second call packs the rest."""
    flags = dict(registry.requires_grad)
    return AdapterRegistry(
        requires_grad=flags, fingerprint=registry.fingerprint, quantization=quantization
    )


def quantize(
    model: nn.Module,
    quantization: StorageConfig | str,
    *,
    exclude: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> Report:
    """Quantise the linear layers of a model in place, one at a time; the output head stays dense.

    Raises:
        ValueError: a weight is not finite; nothing is changed.
        RuntimeError: adapters are attached already. Or a layer failed: the layers before it are
            packed, the others untouched; both are named, the model runs, and a second call packs
            the rest.
    """
    if any(True for _ in adapted_modules(model)):
        raise RuntimeError(
            "quantize: expected a model without adapters, found some; quantise first, or give "
            "attach() the quantization"
        )
    config = require_config(quantization)
    packed: list[str] = []
    snapshot = ModelSnapshot(model)
    try:
        with adopted_layers(model):
            packing = plan_quantization(model, config, keep=list(exclude))
        registry = ensure_registry(model)
        if registry.fingerprint is None:  # else the layers that are missing are packed now
            registry.fingerprint = fingerprint(model)
        registry.quantization, registry.dense = config, packing.dense
        quantize_layers(model, packing, device, PackingWatch(packed, snapshot.renew))
        guard_fast_path(model)
        return parameter_report(model)
    except BaseException:
        base = registry_of(model)
        snapshot.restore()
        if packed and base is not None:
            set_registry(model, _registry_of_packed(base, config))
            guard_fast_path(model)
        raise


def reset_adapters(model: nn.Module, seed: int | None = None) -> None:
    """Reset every adapter to the initial values that attach gives under this seed.

    Raises:
        RuntimeError: an adapter rewrote the base or was initialised from data; detach and attach
            again.
    """
    sharing: dict[int, list[WeightAdapter]] = {}
    for _, module in adapted_modules(model):
        for adapter in adapters_of(module):
            if not adapter.can_reset:
                raise RuntimeError(
                    f"{adapter.site.label}: expected an adapter whose start leaves the base alone "
                    f"and needs no data, got {adapter.method.label}; detach and attach again"
                )
            fresh = adapter.initial_tensors(seed)
            with torch.no_grad():
                for key, tensor in adapter.state_dict(keep_vars=True).items():
                    if key in fresh:
                        tensor.copy_(fresh[key])
            if not isinstance(adapter, WeightAdapter):
                continue
            if adapter.method.starts_from_weight:
                adapter.initialize_from_weight(None)
            if adapter.shared_trained:
                sharing.setdefault(id(adapter.shared_trained), []).append(adapter)
    for adapters in sharing.values():
        first = adapters[0]
        sites = [a.site for a in adapters]
        _, trained = initial_shared(first.method, sites, first.adapter_name, seed)
        with torch.no_grad():
            for key, tensor in first.shared_trained.items():
                tensor.copy_(trained[key])


# ---- before anything changes


def _checked_methods(
    model: nn.Module, method: Method | Sequence[Method], modules_to_save: Sequence[str]
) -> list[Method]:
    """The methods, with what they take from the model filled in."""
    _require_parameters(model)
    _require_no_peft_layers(model)
    require_methods(method, "attach(model, {})")
    methods = [method] if isinstance(method, Method) else list(method)
    if not methods and not modules_to_save:
        raise ValueError(
            "attach: expected at least one method or modules_to_save, got none; everything would "
            "be frozen"
        )
    for each in methods:
        check_patterns(each)
    return resolve_methods(methods, model)


def resolve_methods(methods: Sequence[Method], model: nn.Module) -> list[Method]:
    """Return the methods with the fields filled in that they take from the model."""
    feedforward = feedforward_targets(model)
    return [m.resolved(feedforward) if isinstance(m, WeightMethod) else m for m in methods]


def check_adapter_name(name: str) -> None:
    """Raise unless the name can be a key of `nn.ModuleDict`, and a part of a path.

    Raises:
        ValueError: other characters, or an attribute of the class.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            "adapter_name: expected letters, digits, '_' and '-', and not an attribute of "
            f"nn.ModuleDict, got {name!r}; choose another name"
        )


def _check_name(model: nn.Module, name: str) -> None:
    check_adapter_name(name)
    for _, _, registry in registries_in(model):
        if name in registry.adapters:
            raise RuntimeError(
                f"adapter_name: expected a free name, got {name!r}, which is attached already; "
                "detach it first or choose another name; to go on training a saved adapter, leave "
                "load_adapter out and give PEFT(init_from=directory)"
            )
    if any(module._peft.active.merged for _, module in adapted_modules(model)):
        raise RuntimeError(
            "attach: expected unmerged adapters, found merged ones; call unmerge(model) first"
        )


def _require_parameters(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: expected an nn.Module, got {type(model).__name__}")
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"attach to {type(model).__name__}: expected parameters with a shape, found lazy ones "
            f"({', '.join(lazy[:3])}); run one batch through the model first (under a Trainer: in "
            "the module's __init__ or configure_model)"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"attach to {type(model).__name__}: expected a module with parameters, found none; "
            "build the model first, or give the module that holds it"
        )


def _require_no_peft_layers(model: nn.Module) -> None:
    """Raise ValueError if the model has layers of Hugging Face peft inside."""
    found = [
        f"{name!r} ({type(m).__module__}.{type(m).__name__})"
        for name, m in model.named_modules()
        if type(m).__module__.startswith("peft.") and name
    ]
    if found:
        raise ValueError(
            f"attach to {type(model).__name__}: expected a model without adapters of Hugging Face "
            f"peft, found {len(found)} of its layers, such as {found[-1]}; either train with peft "
            "alone and leave PEFT(...) out, or save the adapter with peft's save_pretrained, use "
            "the plain model (peft_model.unload()), and load it with "
            "lightning_peft.load_adapter(model, directory)"
        )


def _saved_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Fully qualified names of the modules; a suffix matches at a dot."""
    names = [n for n, _ in model.named_modules() if n and not in_adapter(n)]
    found: list[str] = []
    for suffix in wanted:
        hits = [n for n in names if matches_suffix(n, [suffix])]
        if not hits:
            raise ValueError(
                f"modules_to_save: expected a module of this model, got {suffix!r}; nearest names: "
                f"{nearest_names(suffix, names)}"
            )
        found += [h for h in hits if h not in found]
    return found


def _copies_to_follow(model: nn.Module, planned: Sequence[PlannedAdapter]) -> list[FrozenCopy]:
    """Frozen copies of adapted parts, without those that get trained adapters themselves."""
    names = [p.placement.name for p in planned]
    return [
        pair
        for pair in frozen_copies(model)
        if not any(inside(name, [pair.teacher]) for name in names)
        and any(inside(name, [pair.student]) for name in names)
    ]


def _check_copies_stay_dense(
    planned: Sequence[PlannedAdapter], packing: QuantizationPlan | None
) -> None:
    """Raise ValueError if a weight that gets a trained copy is to be quantised."""
    packed = {} if packing is None else {id(m): layout.names for _, m, layout in packing.layers}
    for each in planned:
        placement = each.placement
        if set(packed.get(id(placement.module), ())) & set(placement.paths):
            raise ValueError(
                f"{each.method.label} on {placement.name!r}: expected a dense weight to train a "
                "copy of, got one that is to be quantised; exclude it from the quantization, or "
                "use an adapter"
            )


# ---- what the registry keeps


def _remember_base(
    model: nn.Module, registry: AdapterRegistry, planned: Sequence[PlannedAdapter]
) -> None:
    """Store the base's fingerprint and gradient flags, unless an earlier attach did."""
    if registry.fingerprint is None:
        copied = {
            f"{p.placement.name}.{path}" if p.placement.name else path
            for p in planned
            for path in p.placement.paths
        }
        registry.fingerprint = fingerprint(model, copied)
    if not registry.requires_grad:
        registry.requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}


def _entry(
    methods: list[Method],
    saved: list[str],
    planned: Sequence[PlannedAdapter],
    reasons: dict[str, str],
) -> AdapterEntry:
    sites = [(p.placement.site, p.method.label) for p in planned if not p.placement.paths]
    described = [(site.label, tuple(site.shape), label) for site, label in sites]
    return AdapterEntry(methods, tuple(saved), reasons, described)
