"""Names of modules and parameters: joining, matching, and the nearest ones for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ADAPTER_CHILD",
    "counted",
    "in_adapter",
    "join",
    "matches_suffix",
    "nearest_names",
    "quoted",
    "strip_compile",
    "with_parents",
]

#: Name of the child of an adapted module that holds its adapters.
ADAPTER_CHILD = "peft"


def join(*parts: str) -> str:
    """Join names by dots; empty ones are left out."""
    return ".".join(part for part in parts if part)


def in_adapter(name: str) -> bool:
    """True if a module or key of this name belongs to an adapter."""
    return ADAPTER_CHILD in name and ADAPTER_CHILD in name.split(".")


def strip_compile(name: str) -> str:
    """Return the name without torch.compile's ``_orig_mod``."""
    if "_orig_mod" not in name:
        return name
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def matches_suffix(name: str, suffixes: Iterable[str]) -> bool:
    """True if the name equals one of the suffixes or ends in one at a dot.

    torch.compile's ``_orig_mod`` does not count in either.
    """
    plain = f".{strip_compile(name)}"
    return any(plain.endswith(f".{strip_compile(s)}") for s in suffixes)


def with_parents(name: str) -> list[str]:
    """Return the name of a module and the names of all modules it lies in, but for the root."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def counted(n: int, noun: str) -> str:
    """Return a number and its noun: ``1 difference``, ``2 differences``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def quoted(name: str) -> str:
    """Return a module's name for a message: ``'net.head'``, or ``the model`` for the root."""
    return repr(name) if name else "the model"


def nearest_names(wanted: str, names: Sequence[str], n: int = 5) -> list[str]:
    """Return the names most like `wanted`, compared as a whole and by their last part."""
    leaves = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(wanted, list(names), n, 0.4)
    close += [leaves[m] for m in difflib.get_close_matches(wanted, list(leaves), n, 0.4)]
    return list(dict.fromkeys(close))[:n] or list(names)[:n]
