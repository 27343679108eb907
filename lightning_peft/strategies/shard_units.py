"""Which modules become units of sharding."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from lightning_peft.core.modules import modules_by_name, tied_parameters
from lightning_peft.core.names import join
from lightning_peft.models.modules import hf_models, input_embeddings, output_embeddings

__all__ = ["Unit", "check_ties", "root_units", "shard_units"]

#: Modules that are gathered together, with their names.
Unit = Sequence[tuple[str, nn.Module]]

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


# ---- what is outside of the blocks


def root_units(model: nn.Module, units: Sequence[tuple[str, nn.Module]]) -> list[Unit]:
    """Return the embeddings and heads of Hugging Face models that become units of their own.

    In the root's unit both would be gathered before the first block and kept until backward ends.
    An embedding and a head with one weight form one unit.

    Args:
        model: The model.
        units: The units found by `shard_units`; modules inside them are left out.
    """
    names = {id(m): n for n, m in modules_by_name(model).items()}
    ends: list[tuple[str, nn.Module]] = []
    for _, inner in hf_models(model):
        for module in (input_embeddings(inner), output_embeddings(inner)):
            name = names.get(id(module), "")
            taken = [*units, *ends]
            if module is None or not name or any(_overlap(name, other) for other, _ in taken):
                continue
            ends.append((name, module))
    tied = _tied_names(model)
    ends = _without_outer_ties(ends, tied)
    joined = [{n for n, _ in ends if _holds(n, place)} for place in tied]
    found: list[Unit] = []
    for name, module in ends:
        group = next((g for g in joined if name in g and len(g) > 1), {name})
        if any(name in (n for n, _ in unit) for unit in found):
            continue
        found.append([(n, m) for n, m in ends if n in group] or [(name, module)])
    return found


def _without_outer_ties(
    ends: list[tuple[str, nn.Module]], tied: Sequence[Sequence[str]]
) -> list[tuple[str, nn.Module]]:
    """Return the ends that share no tensor with other modules, such as the bias of BERT's head."""
    while True:
        bound = {
            name
            for group in tied
            if not all(any(_holds(end, [place]) for end, _ in ends) for place in group)
            for name, _ in ends
            if _holds(name, group)
        }
        if not bound:
            return ends
        ends = [(name, module) for name, module in ends if name not in bound]


def _overlap(one: str, other: str) -> bool:
    """Whether two modules are equal or one lies in the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _tied_names(model: nn.Module) -> list[list[str]]:
    return [[place.name for place in group] for group in tied_parameters(model)]


def _holds(module: str, parameters: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for name in parameters)


def check_ties(model: nn.Module, units: Sequence[Unit], chosen: Classes) -> None:
    """Raise if two units hold one tensor: FSDP2 gives a tensor to one unit only.

    Args:
        model: The model.
        units: All units but the root.
        chosen: The user's classes, for the message.

    Raises:
        ValueError: with the names of the tensor and of the units.
    """
    for names in _tied_names(model):
        homes = {_home(name, units) for name in names}
        if len(homes) > 1:
            found = sorted(home or "the root" for home in homes)
            remedy = (
                f"leave their classes out of shard_classes={[_label(c) for c in chosen]}, or name "
                "a class that contains both"
                if chosen
                else "name a class that contains both in shard_classes, or use strategy='peft_ddp'"
            )
            raise ValueError(
                f"peft_fsdp: expected tied parameters in one unit, got {' = '.join(names)} in the "
                f"units {found}: a unit is gathered and freed as one, so a tensor can be in one "
                f"only; {remedy}"
            )


def _home(name: str, units: Sequence[Unit]) -> str:
    """Return the unit that holds a parameter; "" for the root."""
    for unit in units:
        if any(name.startswith(f"{module}.") for module, _ in unit):
            return " + ".join(module for module, _ in unit)
    return ""


def _label(chosen: str | type[nn.Module]) -> str:
    return chosen if isinstance(chosen, str) else chosen.__name__
