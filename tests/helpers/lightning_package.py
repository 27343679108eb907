"""The Lightning package that a test runs under, and test classes that belong to it.

`pl` stands for the current package. The fixture `lightning_package` runs a test once under each
installed one. The environment variable `LIGHTNING_PACKAGE` holds the choice, so that child
processes inherit it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from lightning_peft import register_strategies

INSTALLED = [
    name
    for name in ("lightning.pytorch", "pytorch_lightning")
    if importlib.util.find_spec(name.partition(".")[0]) is not None
]
_VARIABLE = "LIGHTNING_PACKAGE"


def current() -> str:
    """Import name of the package that tests run under now."""
    return os.environ.get(_VARIABLE, INSTALLED[0])


def fabric() -> Any:
    """The Fabric package that the current package is built on."""
    name = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
    return importlib.import_module(name[current()])


@contextmanager
def use_package(name: str) -> Iterator[None]:
    former = current()
    importlib.import_module(name)
    register_strategies()  # the package may have been imported just now
    os.environ[_VARIABLE] = name
    try:
        yield
    finally:
        os.environ[_VARIABLE] = former


class _Current:
    """Attributes of the current package."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(current())
        if hasattr(module, name):
            return getattr(module, name)
        return importlib.import_module(f"{current()}.{name}")


pl: Any = _Current()


class InPackage:
    """Base of test classes: an instance also has the current package's class as a base."""

    lightning_base = "LightningModule"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(in_package(cls))


def in_package(cls: type) -> type:
    """The class with the current package's base."""
    return _completed(cls, getattr(pl, cls.lightning_base))  # type: ignore[attr-defined]


@cache
def _completed(cls: type, base: type) -> type:
    if issubclass(cls, base):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls, base), names)
