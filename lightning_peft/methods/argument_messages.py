"""What a message says of a wrong argument: how it is written."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from lightning_peft.methods.base import Method
from lightning_peft.methods.refused import REFUSED_OPTIONS

__all__ = ["right_form", "unknown_argument"]

#: Arguments that every method has: listed last.
_LAST = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
#: Arguments of other libraries → how the choice is written here.
_ELSEWHERE = {
    "use_dora": "DoRA(...)",
    "arrow_config": "lightning_peft.route(model, names, into)",
    "rank": "r=...",
    "modules_to_save": "PEFT(..., modules_to_save=[...]) or attach(..., modules_to_save=[...])",
    "adapter_name": "PEFT(..., adapter_name=...) or attach(..., adapter_name=...)",
    "quantization": "PEFT(..., quantization=...) or attach(..., quantization=...)",
}


def right_form(
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


def unknown_argument(cls: type[Method], name: str, value: object, known: list[str]) -> str:
    """Return the message for an argument that a method does not have."""
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
