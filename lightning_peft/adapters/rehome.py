"""Gives the adapters of a net to a new module around it.

The registry of adapters lies on the module that `attach` was given, often a LightningModule. Some
libraries wrap the same net in a new LightningModule for every stage of training.
"""

from __future__ import annotations

import copy

from torch import nn

from lightning_peft.core.names import in_adapter
from lightning_peft.core.registry import (
    AdapterRegistry,
    members_in,
    registry_of,
    set_registry,
)
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.models.fingerprint import fingerprint
from lightning_peft.models.history import move_history
from lightning_peft.models.relocation import Rename, relocation, renamed, stray_registries

__all__ = ["rehome", "seen_from"]


def rehome(root: nn.Module) -> bool:
    """Make `root` the root of adapters inside whose former root lies elsewhere.

    Names that the registry holds become names inside of `root`. Parameters around the adapted net
    are frozen, as `attach` would do.

    Returns:
        Whether there were any.

    Raises:
        RuntimeError: only some of the adapted modules are inside, or they lie in another order.
    """
    if registry_of(root) is not None:
        return False
    strays = stray_registries(root)
    if not strays:
        return False
    if len(strays) > 1 or members_in(root, strays[0]) != strays[0].members:
        raise RuntimeError(
            f"{type(root).__name__}: expected all adapted modules of one attach, found only some "
            "of them; give the module that the adapters were attached to, or one around it"
        )
    registry = strays[0]
    rename, now = relocation(root)
    for name, module in adapted_modules(root):
        for adapter in adapters_of(module):
            adapter.site.name = name
    _rename_registry(registry, rename, root, now)
    set_registry(root, registry)
    for name, parameter in root.named_parameters():
        if not in_adapter(name):
            parameter.requires_grad_(name in registry.loose)
    return True


def seen_from(model: nn.Module, registry: AdapterRegistry) -> AdapterRegistry:
    """Return what a registry says of `model`, a part of its root, under names inside of `model`.

    The registry stays as it is: its root may be in use.
    """
    if not any(stray is registry for stray in stray_registries(model)):
        return registry
    rename, now = relocation(model)
    seen = copy.copy(registry)
    seen.adapters = {name: copy.copy(entry) for name, entry in registry.adapters.items()}
    seen.skipped, seen.dense, seen.history = list(registry.skipped), list(registry.dense), None
    _rename_registry(seen, rename, model, now)
    return seen


def _rename_registry(registry: AdapterRegistry, rename: Rename, root: nn.Module, now: str) -> None:
    for entry in registry.adapters.values():
        entry.modules_to_save = tuple(renamed(entry.modules_to_save, rename))
        reasons = {rename(name): why for name, why in entry.reasons.items()}
        entry.reasons = {name: why for name, why in reasons.items() if name is not None}
        sites = [(rename(at), shape, label) for at, shape, label in entry.sites]
        entry.sites = [(at, shape, label) for at, shape, label in sites if at is not None]
    flags = {rename(name): flag for name, flag in registry.requires_grad.items()}
    around = {n: p.requires_grad for n, p in root.named_parameters() if not in_adapter(n)}
    registry.requires_grad = around | {n: flag for n, flag in flags.items() if n is not None}
    for pairs in (registry.skipped, registry.dense):
        pairs[:] = [(new, why) for name, why in pairs if (new := rename(name)) is not None]
    registry.tied = [tuple(renamed(group, rename)) for group in registry.tied]
    registry.adopted = renamed(registry.adopted, rename)
    registry.user_frozen = renamed(registry.user_frozen, rename)
    registry.loose = renamed(registry.loose, rename)
    _rename_fingerprint(registry, rename, root, now)
    if registry.history is not None:
        registry.history = move_history(registry.history, rename)


def _rename_fingerprint(
    registry: AdapterRegistry, rename: Rename, root: nn.Module, now: str
) -> None:
    """Keep what is known of the net, and add what lies around it."""
    if registry.fingerprint is None:
        return
    known = {rename(name): value for name, value in registry.fingerprint["tensors"].items()}
    inside = f"{now}." if now else ""
    around = {
        name: value
        for name, value in fingerprint(root)["tensors"].items()
        if not name.startswith(inside)
    }
    tensors = around | {name: value for name, value in known.items() if name is not None}
    registry.fingerprint = {"tensors": tensors}
