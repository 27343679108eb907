"""Rules for entries of the files that checks and races are kept in.

Anyone can edit such a file, so every value is checked for type and range where it is read.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

__all__ = ["entry_of", "expect", "is_time"]

T = TypeVar("T")


def expect(name: str, value: object, fits: bool, rule: str) -> None:
    """Raise ValueError with the rule and the value unless it fits."""
    if not fits:
        raise ValueError(f"{name}: expected {rule}, got {reprlib.repr(value)}")


def is_time(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= sys.float_info.max  # an integer may be larger


def entry_of(kind: type[T], entry: object) -> T:
    """Return the dataclass that an object of JSON describes; its tuples are lists there.

    Raises:
        ValueError: It is not an object, has other fields, or a field does not follow its rule.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object per entry, got {reprlib.repr(entry)}")
    known = fields(kind)  # type: ignore[arg-type]
    needed = {f.name for f in known if f.default is MISSING}
    if not needed <= set(entry) <= {f.name for f in known}:
        names = ", ".join(f.name for f in known)
        raise ValueError(f"expected entries with {names}, got {reprlib.repr(sorted(entry))}")
    values: dict[str, Any] = dict(entry)
    for field in known:
        value = values.get(field.name)
        if isinstance(value, list) and str(field.type).startswith("tuple"):
            values[field.name] = tuple(value)
    return kind(**values)
