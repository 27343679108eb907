"""Every PEFT method, one file each; importing this package registers them."""

from __future__ import annotations

import importlib
import pkgutil

from lightning_peft.guideline.advice import guideline_table, literature
from lightning_peft.methods.base import Method
from lightning_peft.methods.hybrids import mam, unipelt
from lightning_peft.methods.registry import METHODS

__all__ = ["METHODS", "Method", "guideline_table", "literature", "mam", "unipelt"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
    # The classes are reachable by name, so that `from lightning_peft.methods import DoRA` works for
    # a new file.
globals().update(METHODS)
__all__ += sorted(METHODS)
