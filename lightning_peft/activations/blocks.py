"""Finds the blocks of a model, each of which is one unit of recomputation or offloading."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from lightning_peft.core.modules import modules_by_name
from lightning_peft.core.names import in_adapter, matches_suffix, nearest_names, with_parents

__all__ = ["find_blocks"]

#: Base class of the layers that transformers checkpoints.
_CHECKPOINTED = frozenset({"GradientCheckpointingLayer"})
#: Names of modules that choose which entries of the list next to them run.
_ROUTERS = frozenset({"router", "gate", "gating", "wg", "switch"})


def find_blocks(
    model: nn.Module, names: Sequence[str] | None = None
) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the blocks, none inside another.

    Args:
        model: Any module.
        names: Class names, module names or their suffixes. None takes the layers that transformers
            checkpoints, else the model's no-split list, else the entries of all lists of two or
            more modules of one class, but for lists of experts.

    Raises:
        ValueError: a name matches nothing, or the model has no blocks to find.
    """
    if names is not None:
        return _named(model, names)
    modules = modules_by_name(model)
    unsplit = {
        name for m in modules.values() for name in getattr(m, "_no_split_modules", None) or ()
    }
    found = _of_classes(modules, _CHECKPOINTED) or _of_classes(modules, unsplit) or _repeated(model)
    if not found:
        raise ValueError(
            f"activations on {type(model).__name__}: expected a model with a list of equal blocks, "
            "found none; name blocks: Activations('checkpoint', blocks=[class or module names])"
        )
    return found


def _named(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    modules = {n: m for n, m in modules_by_name(model).items() if n and not in_adapter(n)}
    chosen: dict[str, nn.Module] = {}
    for wanted in names:
        matched = {
            n: m
            for n, m in modules.items()
            if matches_suffix(n, [wanted]) or _has_class(m, (wanted,))
        }
        if not matched:
            known = [*dict.fromkeys(type(m).__name__ for m in modules.values()), *modules]
            raise ValueError(
                f"Activations.blocks: expected the name of a class or module of this model, got "
                f"{wanted!r}; the nearest are {nearest_names(wanted, known)}"
            )
        chosen |= matched
    return _outermost({n: m for n, m in modules.items() if n in chosen})


def _of_classes(
    modules: dict[str, nn.Module], classes: Collection[str]
) -> list[tuple[str, nn.Module]]:
    return _outermost({n: m for n, m in modules.items() if n and _has_class(m, classes)})


def _has_class(module: nn.Module, names: Collection[str]) -> bool:
    """Whether the module's class, or one it derives from, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def _outermost(found: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in found.items() if not any(p in found for p in with_parents(n)[:-1])]


def _repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the entries of outermost lists of equal modules with parameters."""
    modules = modules_by_name(model)
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        inside = any(parent in found for parent in with_parents(name))
        if inside or in_adapter(name) or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        if _routed(modules, name):
            continue
        by_class: dict[type[nn.Module], dict[str, nn.Module]] = {}
        for key, child in module.named_children():
            if any(True for _ in child.children()) and any(True for _ in child.parameters()):
                by_class.setdefault(type(child), {})[f"{name}.{key}" if name else key] = child
        for same in by_class.values():
            if len(same) > 1:
                found |= same
    return [(n, m) for n, m in modules.items() if n in found]


def _routed(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a list holds experts, some of which run for a batch."""
    parent, _, leaf = name.rpartition(".")
    siblings = {child.lower() for child, _ in modules[parent].named_children()} if leaf else set()
    return "expert" in leaf.lower() or bool(siblings & _ROUTERS)
