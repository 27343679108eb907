"""The preflight report: what matched, what it costs, what is fused and why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from lightning_peft.core.names import in_adapter
from lightning_peft.core.registry import registries_in
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.layers.adapter import Adapter
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.report.kernels import KernelWords, groups_over_one_input
from lightning_peft.storage import held_tensors

__all__ = ["Group", "Report", "parameter_report"]


@dataclass
class Group:
    """Layers of one suffix that are adapted alike.

    Attributes:
        layers: Suffix, for instance ``q_proj``.
        count: How many.
        method: Name of the method.
        shape: Canonical shape, or "mixed".
        trainable: Trained elements.
        storage: Where the weights live.
        fused: ``"fused"`` and the dispatch decision with its reason, or why no fused kernel runs.
    """

    layers: str
    count: int
    method: str
    shape: str
    trainable: int
    storage: str
    fused: str


@dataclass
class Report:
    """What `attach` found and made.

    Attributes:
        groups: Adapted layers by suffix.
        trainable: Trained elements.
        total: Logical elements of the model, a 4-bit weight counted as one each, adapters included.
        nbytes: Bytes by part: "base", "quantised base", "adapters".
        skipped: (name, reason) of layers that matched and were left out.
        dense: (name, reason) of linear layers that quantisation left dense.
        tied: Groups of parameter names that share one tensor.
        eval_modules: Number of modules in eval mode (no dropout there).
        notes: Anything else worth saying.
    """

    groups: list[Group] = field(default_factory=list)
    trainable: int = 0
    total: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    eval_modules: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Trained share of all elements, in percent."""
        return 100.0 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        """A plain table."""
        lines = [
            f"{g.layers:<24} ×{g.count:<4} {g.method:<10} {g.shape:<16} {g.trainable:>12,} "
            f"{g.storage:<8} {g.fused}"
            for g in self.groups
        ]
        lines.append(f"trainable {self.trainable:,} of {self.total:,} = {self.percent:.3f} %")
        lines += [f"{part}: {n:,} bytes" for part, n in self.nbytes.items()]
        lines += [f"left out: {name} ({why})" for name, why in self.skipped]
        lines += [f"tied: {' = '.join(names)}" for names in self.tied]
        return "\n".join([*lines, *self.notes])


def parameter_report(model: nn.Module) -> Report:
    """Count and describe; nothing is changed."""
    report = Report()
    for _, _, record in registries_in(model):
        report.skipped += record.skipped
        report.dense += record.dense
        report.tied += record.tied
    _count(model, report)
    words = KernelWords()
    found: dict[tuple[str, str, str, str, str], list[int]] = {}
    for name, module in adapted_modules(model):
        for adapter in adapters_of(module):
            key = (
                name.rpartition(".")[2] or type(module).__name__,
                adapter.method.label,
                _shape(adapter),
                adapter.site.storage.label,
                words.of(adapter),
            )
            found.setdefault(key, []).append(sum(p.numel() for p in adapter.parameters()))
    report.groups = [
        Group(suffix, len(n), method, shape, sum(n), storage, fused)
        for (suffix, method, shape, storage, fused), n in found.items()
    ]
    report.notes += groups_over_one_input(model)
    return report


def _shape(adapter: Adapter) -> str:
    """Shape of the changed weight; "" for adapters that change none."""
    return "×".join(map(str, adapter.site.shape)) if isinstance(adapter, WeightAdapter) else ""


def _count(model: nn.Module, report: Report) -> None:
    nbytes: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in model.named_modules():
        inside = in_adapter(name)
        quantized = held_tensors(module)
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = parameter.numel() * parameter.element_size()
            if parameter.requires_grad:
                report.trainable += parameter.numel()
            if inside:
                nbytes["adapters"] += size
                report.total += parameter.numel()
            elif key in quantized:
                nbytes["quantised base"] += size
                held = quantized[key]
                if key == held.weight:
                    report.total += held.storage.numel(module, key)
            else:
                nbytes["base"] += size
                report.total += parameter.numel()
        if not module.training:
            report.eval_modules += 1
    report.nbytes = dict(nbytes)
