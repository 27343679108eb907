"""Checks of what users give for a method, with the right form in the message."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin

from lightning_peft.core.value_types import argument_types, describe, fits, shown
from lightning_peft.methods.argument_messages import right_form, unknown_argument
from lightning_peft.methods.base import Method

__all__ = ["checked_arguments"]

M = TypeVar("M", bound=type[Method])

_TOO_LARGE = 1 << 63
_LARGEST = 3.4e38  # of fp32


def checked_arguments(cls: M) -> M:
    """Have a method's constructor explain a wrong argument; its signature stays."""
    init: Any = vars(cls).get("__init__")
    if init is None:
        return cls

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:
            _check(cls, args, kwargs)
        init(self, *args, **kwargs)

    type.__setattr__(cls, "__init__", checked)
    return cls


def _check(cls: type[Method], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for an unknown argument, or for a value of another type.

    Raises:
        ValueError: an integer that no tensor size can have, or a number that is not finite in fp32;
            in patterns too.
    """
    fields = [f for f in dataclasses.fields(cast(Any, cls)) if f.init]
    known = {f.name: f for f in fields}
    for name, value in kwargs.items():
        if name not in known:
            raise TypeError(unknown_argument(cls, name, value, list(known)))
    positional = [f.name for f in fields if not f.kw_only]
    wanted = argument_types(cast(Hashable, cls))
    for name, value in {**dict(zip(positional, args, strict=False)), **kwargs}.items():
        annotation = wanted.get(name)
        _check_pattern(cls, name, annotation, value)
        if not fits(value, annotation):
            raise TypeError(
                f"{cls.__name__}: expected {describe(annotation)} for {name}, got {shown(value)}; "
                f"write {cls.__name__}({right_form(known[name], value, name in kwargs, known)})"
            )
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if type(number) is int and abs(number) >= _TOO_LARGE:
                raise ValueError(
                    f"{cls.__name__}: expected {name} below 2**63, got a number of "
                    f"{number.bit_length()} bits; give the size that the layers have"
                )
            if isinstance(number, float) and not abs(number) <= _LARGEST:
                raise ValueError(
                    f"{cls.__name__}: expected a finite number of fp32 for {name}, got {number}"
                )


def _check_pattern(cls: type[Method], name: str, annotation: object, value: object) -> None:
    """Raise TypeError where a pattern gives a layer something else than a number."""
    inner = get_args(annotation)[-1:] if get_origin(annotation) is dict else ()
    if not inner or inner[0] not in (int, float) or not isinstance(value, Mapping):
        return
    for layer, number in value.items():
        if not isinstance(layer, str):
            raise TypeError(f"{cls.__name__} {name}: expected names of layers, got {shown(layer)}")
        if not fits(number, inner[0]):
            raise TypeError(
                f"{cls.__name__} {name}: expected {describe(inner[0])} for {layer!r}, got "
                f"{number!r}"
            )
