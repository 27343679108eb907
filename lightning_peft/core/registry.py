"""Registry of attached adapters, stored as plain data on the root module given to `attach`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.core.modules import base_modules

if TYPE_CHECKING:
    from lightning_peft.methods.base import Method
    from lightning_peft.models.history import ModelHistory
    from lightning_peft.storage import StorageConfig

__all__ = [
    "AdapterEntry",
    "AdapterRegistry",
    "ensure_registry",
    "forget",
    "is_part",
    "join_registry",
    "leave_registry",
    "members_in",
    "membership_of",
    "registries_in",
    "registry_of",
    "set_registry",
]

_ATTRIBUTE = "_peft_registry"
_MEMBERSHIP = "_peft_member_of"


@dataclass
class AdapterEntry:
    """One adapter name.

    Attributes:
        methods: Methods of the adapter; more than one form a hybrid.
        modules_to_save: Names of the modules that are trained as a whole.
        separate_copies: Whether each of them has a copy of its own of a tensor that they share.
        reasons: Module of `modules_to_save` that was found to be new → why.
        sites: (label, canonical shape, name of the method) of every weight it acts on.
        size: Its elements and bytes; None if they may have changed since they were counted.
    """

    methods: list[Method]
    modules_to_save: tuple[str, ...] = ()
    separate_copies: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    sites: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    size: tuple[int, int] | None = None


@dataclass
class AdapterRegistry:
    """All adapters of one root.

    Attributes:
        adapters: Entries by adapter name, in order of attaching.
        active: Active names, in the order named.
        requires_grad: Flags of the model's own parameters before the first attach.
        quantization: Settings that the base was quantised with; None if we did not quantise it.
        skipped: (name, reason) of layers that matched and were left out.
        dense: (name, reason) of linear layers that quantisation left dense.
        tied: Groups of parameter names that share one tensor.
        user_frozen: Parts that the user froze, not those inside a pretrained model.
        loose: New parameters that are trained in place, see `NewLayers`.
        fingerprint: Fingerprint of the base before quantising.
        adopted: Names of layers that arrived quantised and were adopted.
        members: Number of adapted modules.
        history: What happened to the root's own tensors since adapters were attached.
    """

    adapters: dict[str, AdapterEntry] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    quantization: StorageConfig | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    user_frozen: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    fingerprint: dict[str, Any] | None = None
    members: int = 0
    history: ModelHistory | None = None


def registry_of(model: nn.Module) -> AdapterRegistry | None:
    """Return the registry stored on this very module, None if it has none."""
    found: AdapterRegistry | None = vars(model).get(_ATTRIBUTE)
    return found


def ensure_registry(model: nn.Module) -> AdapterRegistry:
    """Return the registry stored on this very module; store an empty one if it has none."""
    found = registry_of(model)
    if found is None:
        found = AdapterRegistry()
        vars(model)[_ATTRIBUTE] = found
    return found


def set_registry(model: nn.Module, registry: AdapterRegistry) -> None:
    """Store a registry on this module."""
    vars(model)[_ATTRIBUTE] = registry


def forget(model: nn.Module) -> None:
    """Remove the registry of this module."""
    vars(model).pop(_ATTRIBUTE, None)


def registries_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterRegistry]]:
    """Yield (prefix, root, registry) of every registry in the tree below `model`, itself included.

    A registry whose root is not in the tree comes last, with `model` for its root: `model` is a
    part of the root, or a new module around an adapted net.
    """
    seen: set[int] = set()
    joined: dict[int, AdapterRegistry] = {}
    for name, module in base_modules(model).items():
        attributes = vars(module)
        found = attributes.get(_ATTRIBUTE)
        if found is not None:
            seen.add(id(found))
            yield name, module, found
        member_of = attributes.get(_MEMBERSHIP)
        if member_of is not None:
            joined[id(member_of)] = member_of
    for key, registry in joined.items():
        if key not in seen:
            yield "", model, registry


def membership_of(module: nn.Module) -> AdapterRegistry | None:
    """Return the registry that an adapted module belongs to."""
    found: AdapterRegistry | None = vars(module).get(_MEMBERSHIP)
    return found


def join_registry(module: nn.Module, registry: AdapterRegistry) -> None:
    """Note on an adapted module which registry it belongs to, unless it has a note already."""
    if _MEMBERSHIP not in vars(module):
        vars(module)[_MEMBERSHIP] = registry
        registry.members += 1


def leave_registry(module: nn.Module) -> None:
    """Remove the note."""
    registry = vars(module).pop(_MEMBERSHIP, None)
    if registry is not None:
        registry.members -= 1


def is_part(model: nn.Module, registry: AdapterRegistry) -> bool:
    """Whether `model` holds only some of the adapted modules of a registry."""
    return registry_of(model) is not registry and members_in(model, registry) < registry.members


def members_in(model: nn.Module, registry: AdapterRegistry) -> int:
    """Return how many modules below `model` belong to the registry."""
    return sum(vars(m).get(_MEMBERSHIP) is registry for m in base_modules(model).values())
