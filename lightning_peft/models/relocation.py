"""Names of an adapted net inside a module that is not the root its adapters were attached to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from lightning_peft.core.names import join
from lightning_peft.core.registry import AdapterRegistry, registries_in, registry_of
from lightning_peft.layers.adapted import adapted_modules, adapters_of

__all__ = ["Rename", "relocation", "renamed", "stray_registries"]

#: Name in the former root → name in the module; None for what lies outside of the module.
Rename = Callable[[str], str | None]


def stray_registries(model: nn.Module) -> list[AdapterRegistry]:
    """Return the registries of adapters inside `model` whose root is not inside it."""
    found = [r for _, at, r in registries_in(model) if at is model and r.adapters]
    return [r for r in found if r is not registry_of(model)]


def relocation(model: nn.Module) -> tuple[Rename, str]:
    """Return how names of the former root become names inside `model`, and where the net lies.

    Raises:
        RuntimeError: the adapted modules lie in another order than in the former root.
    """
    former, now = _prefixes(model)

    def rename(name: str) -> str | None:
        if not former:
            return join(now, name)
        if name == former or name.startswith(f"{former}."):
            return join(now, name[len(former) :].removeprefix("."))
        return None

    return rename, now


def renamed(names: Iterable[str], rename: Rename) -> list[str]:
    """Return the new names of what lies inside."""
    return [new for name in names if (new := rename(name)) is not None]


def _prefixes(model: nn.Module) -> tuple[str, str]:
    """Return the name of the shared part in the former root, and in `model`."""
    found: set[tuple[str, str]] = set()
    for name, module in adapted_modules(model):
        former = next((a.site.name for a in adapters_of(module)), name)
        old, new = former.split("."), name.split(".")
        while old and new and old[-1] == new[-1]:
            old.pop()
            new.pop()
        found.add((".".join(old), ".".join(new)))
    copies = sorted({new for former, new in found if new != former})
    if len(found) > 1 and len(copies) < len(found):
        raise RuntimeError(
            f"{type(model).__name__}: expected every adapted module once, found copies of them "
            f"under {copies}, made after adapters were attached; delete the copies (del "
            f"module.{copies[0]}) to save or merge what was trained. To train with a copy (a "
            "teacher), make it in __init__ or setup(), before adapters are attached, or keep it "
            "where PyTorch does not look for modules: self.copies = [copy.deepcopy(net)]"
        )
    if len(found) != 1:
        raise RuntimeError(
            f"{type(model).__name__}: expected the adapted net as one part, found its modules "
            f"under {sorted(new or 'the root' for _, new in found)}; keep the net whole"
        )
    return found.pop()
