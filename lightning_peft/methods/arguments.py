"""Checks of what users give for a method, with the right form in the message."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin

from lightning_peft.core.value_types import argument_types, describe, fits, shown
from lightning_peft.methods.base import Method
from lightning_peft.methods.refused import REFUSED_OPTIONS

__all__ = ["checked_arguments", "require_methods"]

M = TypeVar("M", bound=type[Method])

#: Arguments that every method has: listed last.
_LAST = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_TOO_LARGE = 1 << 63
_LARGEST = 3.4e38  # of fp32
#: Arguments of other libraries → how the choice is written here.
_ELSEWHERE = {
    "use_dora": "DoRA(...)",
    "arrow_config": "lightning_peft.route(model, names, into)",
    "rank": "r=...",
    "modules_to_save": "PEFT(..., modules_to_save=[...]) or attach(..., modules_to_save=[...])",
    "adapter_name": "PEFT(..., adapter_name=...) or attach(..., adapter_name=...)",
    "quantization": "PEFT(..., quantization=...) or attach(..., quantization=...)",
}


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
            raise TypeError(_unknown(cls, name, value, list(known)))
    positional = [f.name for f in fields if not f.kw_only]
    wanted = argument_types(cast(Hashable, cls))
    for name, value in {**dict(zip(positional, args, strict=False)), **kwargs}.items():
        annotation = wanted.get(name)
        _check_pattern(cls, name, annotation, value)
        if not fits(value, annotation):
            raise TypeError(
                f"{cls.__name__}: expected {describe(annotation)} for {name}, got {shown(value)}; "
                f"write {cls.__name__}({_right_form(known[name], value, name in kwargs, known)})"
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


def _right_form(
    field: dataclasses.Field[Any], value: object, named: bool, known: Mapping[str, Any]
) -> str:
    """Return an argument as it should be written: the value given, if it tells what was meant."""
    if isinstance(value, float) and value.is_integer():
        return f"{field.name}={int(value)}"
    if isinstance(value, str) and not named and "target_modules" in known:
        return f"target_modules={value!r}"
    if isinstance(field.default_factory, type):
        return f"{field.name}={field.default_factory()!r}"
    if field.default is dataclasses.MISSING:
        return f"{field.name}=..."
    return f"{field.name}={field.default!r}"


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


def _unknown(cls: type[Method], name: str, value: object, known: list[str]) -> str:
    theirs = {} if cls.hf is None else {peft: ours for ours, peft in cls.hf.config.items()}
    near = difflib.get_close_matches(name, known, 1, 0.7)
    if name in REFUSED_OPTIONS:
        return (
            f"{cls.__name__}: expected arguments that it has, got {name}={value!r}: "
            f"{REFUSED_OPTIONS[name]}"
        )
    if name in theirs:
        form = f"{cls.__name__}({theirs[name]}={value!r})"
    elif name in _ELSEWHERE:
        form = _ELSEWHERE[name]
    elif near:
        form = f"{cls.__name__}({near[0]}={value!r})"
    else:
        form = f"one of {', '.join(sorted(known, key=_LAST.__contains__))}"
    return f"{cls.__name__}: expected arguments that it has, got {name}={value!r}; write {form}"


def require_methods(given: object, call: str) -> None:
    """Raise TypeError unless `given` is a method or a sequence of methods.

    Args:
        given: The argument.
        call: The call that takes it, with braces in its place: ``"PEFT({})"``.
    """
    what = call.partition("(")[0]
    each = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for method in each:
        if isinstance(method, Method):
            continue
        if isinstance(method, type) and issubclass(method, Method):
            got, form = f"the class {method.__name__}", call.format(f"{method.__name__}()")
        else:
            got, form = shown(method), call.format("LoRA(r=8)")
        raise TypeError(f"{what}: expected a method such as LoRA(r=8), got {got}; write {form}")
