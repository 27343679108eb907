"""Every PEFT method, one file each.

`METHODS` has them by class name, and so has this package: `from lightning_peft.methods import
DoRA`. The file of a method is imported when it is first named.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_peft.methods.base import Method
from lightning_peft.methods.registry import METHODS

if TYPE_CHECKING:
    from lightning_peft.guideline.advice import guideline_table, literature
    from lightning_peft.methods.hybrids import mam, unipelt

__all__ = ["METHODS", "Method", "guideline_table", "literature", "mam", "unipelt"]

#: What is neither a method nor needed by one → its module.
_MODULES = {
    "guideline_table": "lightning_peft.guideline.advice",
    "literature": "lightning_peft.guideline.advice",
    "mam": "lightning_peft.methods.hybrids",
    "unipelt": "lightning_peft.methods.hybrids",
}


def __getattr__(name: str) -> Any:
    """Import what is named for the first time."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if not name.startswith("_") and "." not in name:
        if find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        if name in METHODS:
            return METHODS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, the methods among them."""
    return sorted({*globals(), *__all__, *METHODS})
