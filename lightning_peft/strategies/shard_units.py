"""Which modules become units of sharding."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from lightning_peft.core.names import join

__all__ = ["shard_units"]

#: Names of the modules that choose experts, beside the list of them.
_ROUTERS = frozenset({"router", "gate", "gating", "wg", "switch"})

Classes = Sequence[str | type[nn.Module]]


def shard_units(model: nn.Module, classes: Classes = ()) -> list[tuple[str, nn.Module]]:
    """(name, module), none inside another.

    Modules of the user's classes; else of the model's own no-split list (Hugging Face); else the
    children of the largest list of equal modules that always run, so no lists of experts. An empty
    list: the root alone is sharded.

    Raises:
        ValueError: no module has one of the user's classes.
    """
    if classes:
        found = _of(model, {c if isinstance(c, str) else c.__name__ for c in classes})
        if not found:
            known = sorted({type(m).__name__ for m in model.modules()})
            raise ValueError(
                f"shard_classes: expected classes of this model, got {list(classes)}; there are "
                f"{known[:30]}"
            )
        return found
    told: set[str] = set()
    for module in model.modules():
        told.update(getattr(module, "_no_split_modules", None) or ())
    return _of(model, told) or _largest_repeated(model)


def _of(model: nn.Module, names: Collection[str]) -> list[tuple[str, nn.Module]]:
    """Outermost modules of these classes, under any name that a made class inherits."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and any(c.__name__ in names for c in type(module).__mro__):
            found.append((name, module))
    return found


def _is_expert_list(model: nn.Module, name: str) -> bool:
    """Whether a list holds experts or lies in one; a router decides which of them run.

    A rank that skips an expert would not take part in gathering it, and all ranks would hang.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:i]))
        siblings = {child.lower() for child, _ in parent.named_children()}
        if "expert" in part.lower() or (part and siblings & _ROUTERS and part not in _ROUTERS):
            return True
    return False


def _largest_repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    best: list[tuple[str, nn.Module]] = []
    size = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or _is_expert_list(model, name):
            continue
        by_class: dict[type[nn.Module], list[tuple[str, nn.Module]]] = {}
        for key, child in module.named_children():
            if any(True for _ in child.parameters()):
                label = join(name, key)
                by_class.setdefault(type(child), []).append((label, child))
        for same in by_class.values():
            held = sum(p.numel() for _, m in same for p in m.parameters())
            if len(same) > 1 and held > size:
                best, size = same, held
    return best
