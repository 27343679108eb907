"""Checks values against annotations, and words for the expected type in messages.

Annotations are those of arguments that people write: numbers, texts, collections and mappings of
them, and unions. A value always fits any other annotation.
"""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["argument_types", "describe", "fits", "require_fit", "shown"]

#: Types of single values → how a message calls them, and the test.
_SINGLE: dict[Any, tuple[str, Callable[[object], bool]]] = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, numbers.Integral) and not _is_bool(v)),
    float: ("a number", lambda v: isinstance(v, numbers.Real) and not _is_bool(v)),
    str: ("a string", lambda v: isinstance(v, str)),
    type(None): ("None", lambda v: v is None),
}
_LONGEST = 300  # characters of a value in a message; a method with its arguments has 350
_PLURALS = {str: "strings", int: "whole numbers", float: "numbers"}


@functools.lru_cache(maxsize=512)
def argument_types(owner: Hashable) -> dict[str, Any]:
    """Return the annotated types of a class's or function's names; {} if they cannot be read."""
    try:
        return get_type_hints(owner)
    except (NameError, TypeError):  # an annotation that exists only for type checkers
        return {}


def fits(value: object, annotation: object) -> bool:
    """Whether a value fits. True is no number, and a string is no collection of strings.

    Of a `Literal` only the type is checked; the caller checks which words are allowed.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in _SINGLE:
        return _SINGLE[annotation][1](value)
    if origin is Literal:
        return any(type(value) is type(word) for word in inner)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and _fit_all(value.values(), inner[1:])
    if isinstance(origin, type) and issubclass(origin, Collection):
        is_one = isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection)
        return not is_one and _fit_all(value, inner)  # type: ignore[arg-type]
    return True


def describe(annotation: object) -> str:
    """Return an annotation in words: ``a string or a list of strings``."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in _SINGLE:
        return _SINGLE[annotation][0]
    if origin is Literal:
        return f"one of {', '.join(repr(word) for word in inner)}"
    if origin in (Union, types.UnionType):
        *former, last = dict.fromkeys(describe(one) for one in inner)
        return f"{', '.join(former)} or {last}" if former else last
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{_many(inner[1:])} by name"
    if isinstance(origin, type) and issubclass(origin, Collection):
        return f"a list of {_many(inner)}"
    return getattr(annotation, "__name__", str(annotation))


def require_fit(owner: str, name: str, value: object, annotation: object, form: str) -> None:
    """Raise TypeError unless a value fits; `form` is the argument as it should be written."""
    if not fits(value, annotation):
        raise TypeError(
            f"{owner} {name}: expected {describe(annotation)}, got {shown(value)}; write {form}"
        )


def shown(value: object) -> str:
    """Return a value for a message. Of a long one, such as a module, return only the type."""
    text = repr(value)
    if len(text) <= _LONGEST and "\n" not in text:
        return text
    return f"a value of type {type(value).__name__}"


def _many(inner: tuple[Any, ...]) -> str:
    """Return the plural of what a collection holds."""
    if not inner:
        return "values"
    if isinstance(get_origin(inner[0]), type) and issubclass(get_origin(inner[0]), Collection):
        return f"lists of {_many(get_args(inner[0]))}"
    return _PLURALS.get(inner[0], "values")


def _fit_all(values: Iterable[object], inner: tuple[Any, ...]) -> bool:
    """Whether all values fit the type of elements; a tuple's type may end in ``...``."""
    return not inner or all(fits(value, inner[0]) for value in values)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)
