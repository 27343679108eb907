"""The report at the start of a run: matched layers, sizes, and kernels with reasons."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from lightning_peft.core.modules import base_modules
from lightning_peft.core.names import join
from lightning_peft.core.registry import (
    AdapterRegistry,
    is_part,
    membership_of,
    registries_in,
)
from lightning_peft.layers import ops_for
from lightning_peft.layers.adapted import Adapted, adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.report.kernels import (
    KernelWords,
    groups_over_one_input,
    kernel_lines,
    replaced_lines,
)
from lightning_peft.report.text import report_lines, wrapped
from lightning_peft.storage import held_tensors

__all__ = ["Group", "Report", "attach_report", "parameter_report"]


@dataclass
class Group:
    """Layers of one suffix that are adapted in the same way.

    Attributes:
        layers: Suffix, for instance ``q_proj``.
        path: Path with ``*`` for each number, for instance ``model.layers.*.self_attn.q_proj``.
        count: How many.
        method: Name of the method.
        shape: Canonical shape; "mixed" if the layers differ.
        trainable: Trained elements.
        storage: Where the weights live.
        fused: ``"fused"`` and the dispatch decision with its reason, or why no fused kernel runs.
    """

    layers: str
    path: str
    count: int
    method: str
    shape: str
    trainable: int
    storage: str
    fused: str


@dataclass
class Report:
    """The result of `attach`: adapted layers, sizes, and what was left out.

    Attributes:
        groups: Adapted layers by suffix.
        trainable: Trained elements.
        total: Logical elements of the model, a 4-bit weight counted as one each, adapters included.
        nbytes: Bytes by part: "base", "quantised base", "adapters".
        base_before: Bytes of the base before it was quantised; 0 if unknown.
        dense_kinds: Bytes of the dense base by kind of layer: "embeddings", "norms" …
        storages: Bytes of the quantised base by format.
        bits: Bits per weight of the quantised base by format, scales included.
        trained_fully: (module, reason) of modules that are trained fully.
        user_frozen: Parts that the user froze, not those inside a pretrained model.
        followers: Layers with copies of adapters that are not trained, such as those of an EMA
            teacher; they are in no group.
        loose: New parameters that are trained in place, see `NewLayers`.
        skipped: (name, reason) of layers that matched and were left out.
        dense: (name, reason) of linear layers that quantisation left dense.
        tied: Groups of parameter names that share one tensor.
        eval_modules: Number of modules in eval mode (no dropout there).
        eval_roots: The outermost of them.
        kernels: What runs the layers, one line per difference.
        notes: Anything else worth saying.
    """

    groups: list[Group] = field(default_factory=list)
    trainable: int = 0
    total: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    base_before: int = 0
    dense_kinds: dict[str, int] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    trained_fully: list[tuple[str, str]] = field(default_factory=list)
    user_frozen: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    eval_modules: int = 0
    eval_roots: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Return the trained share of all elements, in percent."""
        return 100.0 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        """Return the report as text of 80 columns."""
        return "\n".join([*report_lines(self), *wrapped(self.kernels)])


def parameter_report(model: nn.Module) -> Report:
    """Count parameters and describe the adapters of a model, without changing it."""
    return _report(model, None)


def attach_report(model: nn.Module, adapter_name: str) -> Report:
    """Count the model, and describe the layers of one adapter, which is the only one that acts.

    Other adapters keep the size that was counted when they were attached.
    """
    return _report(model, adapter_name)


def _report(model: nn.Module, adapter_name: str | None) -> Report:
    report = Report()
    for prefix, _, record in registries_in(model):
        report.skipped += record.skipped
        report.dense += record.dense
        report.tied += record.tied
        report.user_frozen += [join(prefix, name) for name in record.user_frozen]
        report.loose += [join(prefix, name) for name in record.loose]
        report.base_before += _bytes_before(record)
        for name, entry in record.adapters.items():
            if adapter_name is not None and name != adapter_name:
                continue
            report.trained_fully += [
                (join(prefix, part), entry.reasons.get(part, "modules_to_save"))
                for part in entry.modules_to_save
            ]
    report.trained_fully = list(dict.fromkeys(report.trained_fully))
    _count_base(model, report)
    _count_adapters(model, report, adapter_name)
    report.groups = _groups(model, adapter_name)
    report.followers = [
        name
        for name, m in adapted_modules(model)
        if any(a.follows for a in adapters_of(m, adapter_name))
    ]
    lines = kernel_lines(report.groups)
    report.kernels = [*lines, *replaced_lines(lines), *groups_over_one_input(model)]
    return report


def _groups(model: nn.Module, adapter_name: str | None) -> list[Group]:
    words = KernelWords()
    found: dict[tuple[str, str, str, str], list[Adapter]] = {}
    for name, module in adapted_modules(model):
        for adapter in adapters_of(module, adapter_name):
            if adapter.follows:
                continue
            path = re.sub(r"\d+", "*", name) or type(module).__name__
            key = (path, adapter.method.label, adapter.site.storage.label, words.of(adapter))
            found.setdefault(key, []).append(adapter)
    return [
        Group(
            path.rpartition(".")[2],
            path,
            len(adapters),
            method,
            _common({_shape(adapter) for adapter in adapters}),
            sum(p.numel() for adapter in adapters for p in adapter.parameters()),
            storage,
            fused,
        )
        for (path, method, storage, fused), adapters in found.items()
    ]


def _common(shapes: set[str]) -> str:
    return shapes.pop() if len(shapes) == 1 else "mixed"


def _bytes_before(record: AdapterRegistry) -> int:
    """Return the bytes of the base before `attach`."""
    tensors = (record.fingerprint or {}).get("tensors", {})
    return sum(
        prod(shape) * getattr(torch, dtype.removeprefix("torch.")).itemsize
        for shape, dtype, _ in tensors.values()
    )


def _shape(adapter: Adapter) -> str:
    """Return the shape of the changed weight; "" for adapters that change none."""
    return "×".join(map(str, adapter.site.shape)) if isinstance(adapter, WeightAdapter) else ""


def _count_base(model: nn.Module, report: Report) -> None:
    nbytes: Counter[str] = Counter()
    storages: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in base_modules(model).items():
        quantized = held_tensors(module) if module._parameters else {}
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = parameter.numel() * parameter.element_size()
            if parameter.requires_grad:
                report.trainable += parameter.numel()
            if key in quantized:
                nbytes["quantised base"] += size
                held = quantized[key]
                storages[held.storage.label] += size
                if key == held.weight:
                    numel = held.storage.numel(module, key)
                    report.total += numel
                    weights[held.storage.label] += numel
            else:
                nbytes["base"] += size
                kinds[_kind(module)] += size
                report.total += parameter.numel()
        if not module.training:
            report.eval_modules += 1
            if not any(name.startswith(f"{root}.") or not root for root in report.eval_roots):
                report.eval_roots.append(name)
    report.nbytes, report.storages = dict(nbytes), dict(storages)
    report.bits = {label: 8 * storages[label] / n for label, n in weights.items() if n}
    report.dense_kinds = dict(kinds.most_common())


def _count_adapters(model: nn.Module, report: Report, adapter_name: str | None) -> None:
    nbytes = 0
    seen: set[int] = set()
    modules = [m for _, m in adapted_modules(model)]
    for _, root, record in registries_in(model):
        whole = not is_part(root, record)
        for name, entry in record.adapters.items():
            if whole and entry.size is not None and adapter_name not in (None, name):
                size = entry.size
            else:
                held = {id(p): p for m in modules for p in _own_parameters(m, record, name)}
                found = [p for key, p in held.items() if key not in seen]
                seen |= held.keys()
                size = (
                    sum(p.numel() for p in found),
                    sum(p.numel() * p.element_size() for p in found),
                )
                report.trainable += sum(p.numel() for p in found if p.requires_grad)
                entry.size = size if whole else entry.size
            report.total += size[0]
            nbytes += size[1]
    if nbytes:
        report.nbytes["adapters"] = nbytes


def _own_parameters(
    module: Adapted, registry: AdapterRegistry, adapter_name: str
) -> list[nn.Parameter]:
    if membership_of(module) is not registry or adapter_name not in module.peft:
        return []
    return list(module.peft[adapter_name].parameters())


def _kind(module: nn.Module) -> str:
    ops = ops_for(module)
    if ops is not None and ops.is_embedding:
        return "embeddings"
    if ops is not None and ops.is_linear:
        return "linear layers"
    return "norms" if "Norm" in type(module).__name__ else "other"
