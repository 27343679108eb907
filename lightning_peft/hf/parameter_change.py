"""The change that an adapter makes to each parameter of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_peft.adapters.merge_plan import ModuleMerge
from lightning_peft.layers.weight_adapter import WeightAdapter

__all__ = ["ParameterChange", "parameter_changes"]


@dataclass
class ParameterChange:
    """The change that an adapter makes to one parameter.

    Attributes:
        part: The module that reads the parameter.
        path: Path of the parameter in the module.
        edits: Adapters that edit the weight.
        biased: Adapters that edit the weight whose bias this is.
        copy: A trained copy that replaces the parameter.
    """

    part: ModuleMerge
    path: str
    edits: list[WeightAdapter] = field(default_factory=list)
    biased: list[WeightAdapter] = field(default_factory=list)
    copy: Tensor | None = None


def parameter_changes(plan: Sequence[ModuleMerge]) -> dict[str, ParameterChange]:
    """Return the changes of a merge by parameter name."""
    found: dict[str, ParameterChange] = {}
    for part in plan:
        for adapter in part.edits():
            path = adapter.site.parameter
            found.setdefault(part.key(path), ParameterChange(part, path)).edits.append(adapter)
            bias = adapter.site.ops.bias(part.module, path)
            if bias is not None and adapter.edit().changes_bias:
                found.setdefault(part.key(bias), ParameterChange(part, bias)).biased.append(adapter)
        for other in part.adapters:
            for path, value in other.copies().items():
                found.setdefault(part.key(path), ParameterChange(part, path)).copy = value.detach()
    return found
