"""Gives the adapters of a net to a new module around it.

The registry of adapters lies on the module that `attach` was given, often a LightningModule. Some
libraries wrap the same net in a new LightningModule for every stage of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from lightning_peft.core.names import in_adapter, join
from lightning_peft.core.registry import (
    AdapterRegistry,
    members_in,
    registries_in,
    registry_of,
    set_registry,
)
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from lightning_peft.models.fingerprint import fingerprint
from lightning_peft.models.history import move_history

__all__ = ["rehome"]

_Rename = Callable[[str], str | None]


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
    strays = [r for _, at, r in registries_in(root) if at is root and r.adapters]
    if not strays:
        return False
    if len(strays) > 1 or members_in(root, strays[0]) != strays[0].members:
        raise RuntimeError(
            f"{type(root).__name__}: expected all adapted modules of one attach, found only some "
            "of them; give the module that the adapters were attached to, or one around it"
        )
    registry = strays[0]
    former, now = _prefixes(root)
    _rename_registry(registry, _renamer(former, now), root, now)
    set_registry(root, registry)
    for name, parameter in root.named_parameters():
        if not in_adapter(name):
            parameter.requires_grad_(False)
    return True


def _prefixes(root: nn.Module) -> tuple[str, str]:
    """Return the name of the shared part in the former root, and in `root`."""
    found: set[tuple[str, str]] = set()
    for name, module in adapted_modules(root):
        former = next((a.site.name for a in adapters_of(module)), name)
        old, new = former.split("."), name.split(".")
        while old and new and old[-1] == new[-1]:
            old.pop()
            new.pop()
        found.add((".".join(old), ".".join(new)))
    if len(found) != 1:
        raise RuntimeError(
            f"{type(root).__name__}: expected the adapted net as one part, found its modules under "
            f"{sorted(new or 'the root' for _, new in found)}; keep the net whole"
        )
    return found.pop()


def _renamer(former: str, now: str) -> _Rename:
    def rename(name: str) -> str | None:
        if not former:
            return join(now, name)
        if name == former or name.startswith(f"{former}."):
            return join(now, name[len(former) :].removeprefix("."))
        return None

    return rename


def _renamed(names: Iterable[str], rename: _Rename) -> list[str]:
    return [new for name in names if (new := rename(name)) is not None]


def _rename_registry(registry: AdapterRegistry, rename: _Rename, root: nn.Module, now: str) -> None:
    for name, module in adapted_modules(root):
        for adapter in adapters_of(module):
            adapter.site.name = name
    for entry in registry.adapters.values():
        entry.modules_to_save = tuple(_renamed(entry.modules_to_save, rename))
        reasons = {rename(name): why for name, why in entry.reasons.items()}
        entry.reasons = {name: why for name, why in reasons.items() if name is not None}
        entry.sites = [(rename(at) or at, shape, label) for at, shape, label in entry.sites]
    flags = {rename(name): flag for name, flag in registry.requires_grad.items()}
    around = {n: p.requires_grad for n, p in root.named_parameters() if not in_adapter(n)}
    registry.requires_grad = around | {n: flag for n, flag in flags.items() if n is not None}
    for pairs in (registry.skipped, registry.dense):
        pairs[:] = [(new, why) for name, why in pairs if (new := rename(name)) is not None]
    registry.tied = [tuple(_renamed(group, rename)) for group in registry.tied]
    registry.adopted = _renamed(registry.adopted, rename)
    _rename_fingerprint(registry, rename, root, now)
    if registry.history is not None:
        registry.history = move_history(registry.history, rename)


def _rename_fingerprint(
    registry: AdapterRegistry, rename: _Rename, root: nn.Module, now: str
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
