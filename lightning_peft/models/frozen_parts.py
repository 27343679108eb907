"""Parts of a model that its user froze: teachers, reference models, loss networks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.modules import base_modules, base_parameters
from lightning_peft.core.names import join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.storage import held_tensors, storage_of

__all__ = ["FrozenCopy", "frozen_copies", "frozen_parts", "inside", "names_part"]


#: Names of a trained part and of the average that follows it.
_COPY_NAMES = (("student", "teacher"), ("online", "target"), ("query", "key"), ("net", "ema"))


class FrozenCopy(NamedTuple):
    """A frozen part that has the class and the tensors of a trained part.

    Attributes:
        student: Name of the trained part.
        teacher: Name of the frozen part.
    """

    student: str
    teacher: str


def frozen_parts(model: nn.Module) -> list[str]:
    """Return the largest modules all of whose parameters were frozen before the first attach.

    Packed integer weights count neither way. A model without any trained parameter has no such
    parts: it was frozen as a preparation for adapters.
    """
    flags = _trained_flags(model)
    if not any(flags.values()) or all(flags.values()):
        return []
    trained = _parents(name for name, flag in flags.items() if flag)
    frozen = _parents(name for name, flag in flags.items() if not flag)
    found: list[str] = []
    for name in base_modules(model):
        if name in frozen and name not in trained and not inside(name, found[-1:]):
            found.append(name)
    return found


def frozen_copies(model: nn.Module) -> list[FrozenCopy]:
    """Return the frozen parts that are a copy of a trained part, with that part.

    A copy has the same class and the same parameters by name and shape, at the same depth. Its
    values are equal, or its name says that it follows.

    An average of the trained part (an EMA teacher) is updated parameter by parameter, in the order
    of `parameters()`; so both must get the same adapters.
    """
    parts = frozen_parts(model)
    if not parts:
        return []
    flags = _trained_flags(model)
    trained = _parents(name for name, flag in flags.items() if flag) - {""}
    found: list[FrozenCopy] = []
    for part in parts:
        teacher = model.get_submodule(part)
        structure = _structure(teacher)
        alike = [
            name
            for name, module in base_modules(model).items()
            if name in trained
            and name.count(".") == part.count(".")
            and name not in {pair.student for pair in found}
            and base_class(module) is base_class(teacher)
            and _structure(module) == structure
            and (_are_named_as_copies(name, part) or _are_equal(module, teacher))
        ]
        if alike:
            found.append(FrozenCopy(max(alike, key=lambda name: _likeness(name, part)), part))
    return found


def _are_named_as_copies(student: str, teacher: str) -> bool:
    """Whether names say that one part follows the other: ``backbone``, ``backbone_momentum``.

    Names that differ only in an index say nothing: they are blocks of one stack.
    """
    if re.sub(r"\d+", "", student) == re.sub(r"\d+", "", teacher):
        return False
    if _likeness(student, teacher) >= 0.6:
        return True
    first, second = (set(re.split(r"[._]", name)) for name in (student, teacher))
    return any(one in first and other in second for one, other in _COPY_NAMES)


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether the parameters have equal values, as those of a deep copy do."""
    ours = list(base_parameters(one).values())
    theirs = list(base_parameters(other).values())
    return len(ours) == len(theirs) and all(
        p.device.type != "meta"
        and p.shape == q.shape
        and p.device == q.device
        and torch.equal(p, q)
        for p, q in zip(ours, theirs, strict=True)
    )


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def inside(name: str, parts: Sequence[str]) -> bool:
    """Whether a module is one of the parts, or lies in one; all lie in the part ""."""
    return any(not part or name == part or name.startswith(f"{part}.") for part in parts)


def names_part(rule: str | Sequence[str] | None, part: str) -> bool:
    """Whether a `target_modules` rule names a part, rather than only matching inside it."""
    if rule is None or rule == "all-linear":
        return False
    leaf = part.rpartition(".")[2]
    if isinstance(rule, str):
        return leaf in rule
    return any(leaf in entry.split(".") for entry in rule)


def _trained_flags(model: nn.Module) -> dict[str, bool]:
    """Return whether the user trained each floating-point parameter, before adapters came."""
    flags = {
        name: p.requires_grad for name, p in base_parameters(model).items() if p.is_floating_point()
    }
    for prefix, _, registry in registries_in(model):
        before = {join(prefix, name): flag for name, flag in registry.requires_grad.items()}
        flags |= {name: flag for name, flag in before.items() if name in flags}
    return flags


def _parents(names: Iterable[str]) -> set[str]:
    """Return the names of all modules that parameters of these names lie in; "" for the root."""
    found: set[str] = set()
    for name in names:
        parent = name.rpartition(".")[0]
        while parent not in found:
            found.add(parent)
            parent = parent.rpartition(".")[0]
    return found


def _structure(module: nn.Module) -> list[tuple[str, torch.Size]]:
    """Return names and natural shapes of the parameters."""
    shapes = []
    for name, inner in base_modules(module).items():
        held = held_tensors(inner)
        for key, p in inner._parameters.items():
            if p is None or (key in held and key != held[key].weight):
                continue
            shape = storage_of(inner, key).shape(inner, key) if key in held else p.shape
            shapes.append((strip_compile(join(name, key)), shape))
    return shapes
