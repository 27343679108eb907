"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

__all__ = ["parse_bytes", "size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str, name: str = "memory") -> int:
    """Return a number of bytes: 24GB is 24 · 10⁹, 24GiB is 24 · 2³⁰.

    Args:
        text: The size.
        name: Name of the argument, for the message.

    Raises:
        ValueError: no such number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None:
        raise ValueError(f"{name}: expected a size such as '24GB' or '22.5GiB', got {text!r}")
    number, unit, binary = found.groups()
    factor = _UNITS[unit]
    if binary:
        factor = 1024 ** list(_UNITS).index(unit)
    return int(float(number) * factor)


def size(nbytes: float) -> str:
    """Return bytes for people: 14.83 GB, 512.00 kB (powers of ten)."""
    for unit, n in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= n:
            return f"{nbytes / n:,.2f} {unit}"
    return f"{nbytes:.0f} B"
