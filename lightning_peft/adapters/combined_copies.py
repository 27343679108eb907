"""Trained biases and heads of adapters that are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.modules import parameter_at
from lightning_peft.core.registry import AdapterRegistry
from lightning_peft.layers.adapted import adapted_modules, adapters_of, weight_adapters_of
from lightning_peft.layers.copy_adapter import CopyAdapter
from lightning_peft.methods.modules_to_save import TrainedBias

__all__ = ["CombinedCopies", "combined_copies"]

#: (id of the module, path of the tensor) → value.
_Values = dict[tuple[int, str], Tensor]


@dataclass
class CombinedCopies:
    """What the combined adapter holds besides low-rank changes.

    Attributes:
        bias: Biases that it trains, as in LoRA.
        heads: Names of its trained modules.
        values: The value of each copy.
    """

    bias: Literal["none", "all", "lora_only"] = "none"
    heads: list[str] = field(default_factory=list)
    values: _Values = field(default_factory=dict)

    def copy_into(self, root: nn.Module, adapter_name: str) -> None:
        """Copy the values into an adapter that was attached."""
        with torch.no_grad():
            for _, module in adapted_modules(root):
                for adapter in adapters_of(module, adapter_name):
                    for path, tensor in adapter.substitutes().items():
                        value = self.values.get((id(module), path))
                        if value is not None:
                            tensor.copy_(value)


def combined_copies(
    root: nn.Module, record: AdapterRegistry, names: Sequence[str], weights: Sequence[float]
) -> CombinedCopies:
    """Return the copies of a combination.

    Changes of biases are summed by the weights: b + Σ wᵢ (bᵢ − b). A trained module must belong
    to one adapter only, and is copied unchanged.

    Raises:
        ValueError: several adapters have trained the same module.
    """
    found = CombinedCopies()
    owners: dict[int, str] = {}
    modes: set[str] = set()
    for path, module in adapted_modules(root):
        for name, weight in zip(names, weights, strict=True):
            for adapter in adapters_of(module, name):
                if not isinstance(adapter, CopyAdapter):
                    continue
                if isinstance(adapter.method, TrainedBias):
                    _add_biases(found.values, module, adapter.copies(), weight)
                    continue
                owner = owners.setdefault(id(module), name)
                if owner != name:
                    raise ValueError(
                        f"combine: {path!r}: expected a trained module of one adapter, got those "
                        f"of {owner!r} and {name!r}, whose mean is no trained module; leave one "
                        "out, or attach it without modules_to_save"
                    )
                for key, tensor in adapter.substitutes().items():
                    found.values[id(module), key] = tensor.detach()
            modes |= {a.method.trained_biases() for a in weight_adapters_of(module, name)}
    found.bias = "all" if "all" in modes else "lora_only" if "adapted" in modes else "none"
    for name in names:
        found.heads += [h for h in record.adapters[name].modules_to_save if h not in found.heads]
    return found


def _add_biases(
    values: _Values, module: nn.Module, copies: Mapping[str, Tensor], weight: float
) -> None:
    for path, tensor in copies.items():
        base = parameter_at(module, path).detach()
        so_far = values.get((id(module), path), base)
        values[id(module), path] = so_far + weight * (tensor.detach() - base)
