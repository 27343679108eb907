"""Attach: changes any `nn.Module` in place.

All checks run before the first change. Base keys never change; an adapter is stored as
`<module>.peft.<adapter name>.<tensor>`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from lightning_peft.adapters.activation import activate
from lightning_peft.adapters.adoption import adopted_layers
from lightning_peft.adapters.attach_checks import (
    check_copies_stay_dense,
    check_free_name,
    check_starts_can_be_written,
    check_starts_leave_ties,
    checked_methods,
    saved_modules,
)
from lightning_peft.adapters.batch import observe_batch, stack_of
from lightning_peft.adapters.build import AdapterBuilder, guard_fast_path
from lightning_peft.adapters.followers import can_follow, follow
from lightning_peft.adapters.new_layers import new_layers_of
from lightning_peft.adapters.placement.placement import PlannedAdapter
from lightning_peft.adapters.placement.unused_rules import unused_rules
from lightning_peft.adapters.plan import AttachPlan, plan_attach
from lightning_peft.adapters.quantize import (
    PackingWatch,
    plan_quantization,
    quantize_layers,
    students_of_dense,
)
from lightning_peft.adapters.rehome import rehome
from lightning_peft.adapters.snapshot import ModelSnapshot
from lightning_peft.core.modules import base_parameters, unchanged_modules
from lightning_peft.core.registry import (
    AdapterEntry,
    AdapterRegistry,
    ensure_registry,
    join_registry,
    registry_of,
    set_registry,
)
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.projection_group import share_inputs
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.methods.base import Method, WeightMethod
from lightning_peft.models.fingerprint import fingerprint
from lightning_peft.models.frozen_parts import FrozenCopy, frozen_copies, inside
from lightning_peft.models.history import start_history
from lightning_peft.models.pretrained import NewLayers
from lightning_peft.models.quantized_config import forget_quantization
from lightning_peft.models.saving import save_plainly
from lightning_peft.models.shared_inputs import children_sharing_input
from lightning_peft.report.summary import Report, attach_report, parameter_report
from lightning_peft.storage import StorageConfig, as_config, require_config

__all__ = [
    "attach",
    "attach_within",
    "quantize",
]


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    adapter_name: str = "default",
    quantization: StorageConfig | str | None = None,
    modules_to_save: Sequence[str] | None = (),
    device: torch.device | str | None = None,
    separate_copies: bool = False,
) -> Report:
    """Freeze the model, quantise it if asked, and attach an adapter in place.

    Args:
        model: Any module; a Hugging Face model, a LightningModule, or one layer.
        method: One method, or several as a hybrid under one name (applied in this order).
        adapter_name: Letters, digits, ``_`` and ``-``.
        quantization: Quantise the frozen linear layers, layer by layer. Give ``"nf4"`` or a
            configuration.
        modules_to_save: Names or suffixes of modules that are trained fully. None finds the new
            layers next to a pretrained model, as the callback does.
        device: Where to quantise; the weights stay there. None means where each weight is.
        separate_copies: If False, modules in `modules_to_save` that share a tensor (tied
            embeddings) share its trained copy, and stay tied. If True, each gets a copy of its own,
            as in peft without ``ensure_weight_tying``.

    Returns:
        The report of what matched and what it costs. Its counts are those of the whole model, its
        layers those of this adapter; `parameter_report` describes all adapters.

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
        separate_copies=separate_copies,
    )


def attach_within(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    adapter_name: str,
    quantization: StorageConfig | None,
    modules_to_save: Sequence[str] | None,
    device: torch.device | str | None,
    keep_on: torch.device | None = None,
    averaged: Mapping[str, str] = MappingProxyType({}),
    separate_copies: bool = False,
) -> Report:
    """`attach` for a part of a larger module.

    Args:
        model: As in `attach`; so are the other arguments.
        keep_on: Where packed layers are moved to; None leaves them on `device`.
        averaged: Parts of the model that are averaged into a dense part outside, with its name.
        separate_copies: As in `attach`.
    """
    new = NewLayers()
    if modules_to_save is None:
        new = new_layers_of(model, method)
        modules_to_save = list(new.trained)
    methods = checked_methods(model, method, modules_to_save)
    snapshot, built, packed = ModelSnapshot(model), list[WeightAdapter](), list[str]()
    try:
        rehome(model)
        check_free_name(model, adapter_name)
        with adopted_layers(model), unchanged_modules():
            saved = saved_modules(model, modules_to_save)
            plan = plan_attach(model, methods, saved, separate_copies)
            copies = _copies_to_follow(model, plan)
            followers = [pair.teacher for pair in copies]
            averaged = {**averaged, **students_of_dense(copies, quantization)}
            packing = (
                None
                if quantization is None
                else plan_quantization(
                    model,
                    quantization,
                    keep=saved,
                    frozen=[part for part in plan.left_frozen if part not in followers],
                    averaged=averaged,
                )
            )
            check_copies_stay_dense(plan.adapters, packing)
            check_starts_can_be_written(plan.adapters, packing)
            check_starts_leave_ties(model, plan.adapters)
            unused = unused_rules(model, methods, plan.adapters)
            readers = [m for m in methods if isinstance(m, WeightMethod) and m.reads_tokens]
            observed = [(m, stack_of(model, m)) for m in readers]
        for line in unused:
            warnings.warn(line, stacklevel=3)
        registry = ensure_registry(model)
        _remember_base(model, registry, plan.adapters)
        builder = AdapterBuilder(plan.adapters, adapter_name, built)
        registry.loose = list(dict.fromkeys([*registry.loose, *new.loose]))
        for name, parameter in base_parameters(model).items():
            parameter.requires_grad_(name in registry.loose)
        if packing is not None:
            watch = PackingWatch(packed, snapshot.renew, builder.around_packing, keep_on)
            quantize_layers(model, packing, device, watch)
            registry.quantization, registry.dense = quantization, packing.dense
            if packing.transcoded:
                forget_quantization(model)
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
        registry.adapters[adapter_name] = _entry(
            methods, saved, plan.adapters, new.trained, separate_copies
        )
        registry.user_frozen = list(dict.fromkeys([*plan.left_frozen, *new.frozen]))
        registry.skipped, registry.tied = plan.skipped, plan.tied
        activate(model, registry, [adapter_name])
        save_plainly(model)
        with unchanged_modules():
            start_history(model, again=packed)
            return attach_report(model, adapter_name)
    except BaseException:
        base = registry_of(model)
        snapshot.restore(built)
        if packed and base is not None:  # packed layers stay packed: their dense weights are gone
            set_registry(model, _registry_of_packed(base, quantization))
            save_plainly(model)
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
    """Quantise the linear layers of a model in place, layer by layer. The output head stays dense.

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
        if packing.transcoded:
            forget_quantization(model)
        guard_fast_path(model)
        save_plainly(model)
        return parameter_report(model)
    except BaseException:
        base = registry_of(model)
        snapshot.restore()
        if packed and base is not None:
            set_registry(model, _registry_of_packed(base, config))
            guard_fast_path(model)
            save_plainly(model)
        raise


def _copies_to_follow(model: nn.Module, plan: AttachPlan) -> list[FrozenCopy]:
    """Frozen copies of adapted parts, without those that get trained adapters themselves."""
    if not plan.frozen_parts:
        return []
    names = [p.placement.name for p in plan.adapters]
    return [
        pair
        for pair in frozen_copies(model)
        if not any(inside(name, [pair.teacher]) for name in names)
        and any(inside(name, [pair.student]) for name in names)
    ]


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
        registry.requires_grad = {n: p.requires_grad for n, p in base_parameters(model).items()}


def _entry(
    methods: list[Method],
    saved: list[str],
    planned: Sequence[PlannedAdapter],
    reasons: dict[str, str],
    separate_copies: bool,
) -> AdapterEntry:
    sites = [(p.placement.site, p.method.label) for p in planned if not p.placement.paths]
    described = [(site.label, tuple(site.shape), label) for site, label in sites]
    return AdapterEntry(methods, tuple(saved), separate_copies, reasons, described)
