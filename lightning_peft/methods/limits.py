"""Ranges of a method's arguments: data beside its fields, checked when the method is made."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin

from lightning_peft.core.value_types import argument_types, fits

__all__ = [
    "COUNT",
    "FACTOR",
    "FRACTION",
    "SHARE",
    "Limit",
    "above",
    "at_least",
    "between",
    "check_limits",
    "one_of",
    "only",
]


@dataclass(frozen=True)
class Limit:
    """A rule for the value of one argument.

    Attributes:
        text: The rule in a message, with braces in place of the argument's name.
        holds: Whether a value keeps to it.
    """

    text: str
    holds: Callable[[Any], bool]


#: A probability of dropping, or a decay rate: below 1.
FRACTION = Limit("0 <= {} < 1", lambda v: 0 <= v < 1)


#: A share of something, none of it left out.
SHARE = Limit("0 < {} <= 1", lambda v: 0 < v <= 1)


#: A factor on the change, which may be negative.
FACTOR = Limit("{} != 0, since the adapter then changes nothing", lambda v: v != 0)


def at_least(low: float) -> Limit:
    """Return the rule of numbers from `low` on."""
    return Limit(f"{{}} >= {low}", lambda v: v >= low)


def above(low: float, why: str = "") -> Limit:
    """Return the rule of numbers larger than `low`; `why` follows it in the message."""
    return Limit(f"{{}} > {low}{why}", lambda v: v > low)


def between(low: float, high: float) -> Limit:
    """Return the rule of numbers from `low` to `high`."""
    return Limit(f"{low} <= {{}} <= {high}", lambda v: low <= v <= high)


#: Virtual tokens, and other counts of trained vectors that no layer's size bounds. No context is
#: longer.
COUNT = between(1, 1 << 20)


def one_of(choices: Iterable[object]) -> Limit:
    """Return the rule of a fixed set of values. A `Literal` field needs none."""
    known = tuple(choices)
    return Limit(f"{{}} in {known}", known.__contains__)


def only(value: object) -> Limit:
    """Return the rule of an option of the parent class that must keep this value."""
    return Limit(f"{{}}={value!r}", lambda v: v == value)


def check_limits(method: Any) -> None:
    """Check a method's fields: words of `Literal` annotations, and `limits` of all its classes.

    The rule of a pattern holds for each of its values. None is checked by the type alone.

    Raises:
        ValueError: with the first field that breaks its rule.
    """
    cls = type(method)
    for name, annotation in argument_types(cast(Hashable, cls)).items():
        if name in cls.__dataclass_fields__:
            _check_words(method.label, name, annotation, getattr(method, name))
    rules: dict[str, Limit] = {}
    for base in reversed(cls.__mro__):
        rules |= vars(base).get("limits", {})
    for name, limit in rules.items():
        value = getattr(method, name)
        each = value.items() if isinstance(value, Mapping) else ((name, value),)
        for where, number in each:
            if number is not None and not limit.holds(number):
                raise ValueError(
                    f"{method.label}: expected {limit.text.format(name)}, got {where} = {number!r}"
                )


#: Types of few values → the values, for messages.
_SINGLE_VALUES: dict[object, tuple[object, ...]] = {bool: (True, False), type(None): (None,)}


def _check_words(label: str, name: str, annotation: object, value: object) -> None:
    """Raise ValueError if the value is none of the words, and of no other type, that may stand."""
    parts = (annotation,) if get_origin(annotation) is Literal else get_args(annotation)
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    if not words:
        return
    others = [part for part in parts if get_origin(part) is not Literal]
    if value in words or any(fits(value, part) for part in others):
        return
    known = (*words, *(v for part in others for v in _SINGLE_VALUES.get(part, ())))
    raise ValueError(f"{label}: expected {name} in {known}, got {value!r}")
