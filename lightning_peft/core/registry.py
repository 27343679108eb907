"""What a model remembers about its adapters: kept on the root that attach was given, as plain
data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["AdapterEntry", "AdapterRegistry", "registries_in", "registry_of"]

_ATTRIBUTE = "_peft_registry"


@dataclass
class AdapterEntry:
    """One adapter name.

    Attributes:
        methods: Its methods; more than one is a hybrid.
        modules_to_save: Names of modules trained whole.
        sites: (label, canonical shape, method's name) of every place it acts on.
    """

    methods: list[Any]
    modules_to_save: tuple[str, ...] = ()
    sites: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)


@dataclass
class AdapterRegistry:
    """All adapters of one root.

    Attributes:
        adapters: By name, in order of attaching.
        active: Active names, in the order named.
        requires_grad: Flags of the model's own parameters from before the first attach.
        quantization: What the base was quantised with, None if it was not by us.
        skipped: (name, reason) of layers that matched and were left out.
        dense: (name, reason) of linear layers that quantisation left dense.
        tied: Groups of parameter names that share one tensor.
        fingerprint: Of the base, from before quantising.
        buffers: Hashes of the persistent buffers at that time: training may move some of them.
    """

    adapters: dict[str, AdapterEntry] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    quantization: Any = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    fingerprint: dict[str, Any] | None = None
    buffers: dict[str, str] = field(default_factory=dict)


def registry_of(model: nn.Module, *, create: bool = False) -> AdapterRegistry | None:
    """The record kept on exactly this module."""
    found: AdapterRegistry | None = vars(model).get(_ATTRIBUTE)
    if found is None and create:
        found = AdapterRegistry()
        vars(model)[_ATTRIBUTE] = found
    return found


def forget(model: nn.Module) -> None:
    """Drop the record of this module."""
    vars(model).pop(_ATTRIBUTE, None)


def registries_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterRegistry]]:
    """(prefix, root, record) of every record in the tree below `model`, itself included."""
    for name, module in model.named_modules():
        found = registry_of(module)
        if found is not None:
            yield name, module, found
