"""The methods by name, and as plain data for checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

from lightning_peft.methods.arguments import checked_arguments
from lightning_peft.methods.base import HFFormat, Method, Targeted

__all__ = ["METHODS", "from_dict", "register", "to_dict"]


class Methods(MutableMapping[str, type[Method]]):
    """Class name → method. Files of a folder are imported when a name asks for them.

    The file of a method has the name of its class in snake case. A name that fits no file, and
    every question about all methods, imports the whole folder.

    Args:
        package: The package whose modules register methods.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._registered: dict[str, type[Method]] = {}
        self._is_complete = False

    def _modules(self) -> list[str]:
        folder = importlib.import_module(self._package).__path__
        return [module.name for module in pkgutil.iter_modules(folder)]

    def _load(self, module: str) -> None:
        importlib.import_module(f"{self._package}.{module}")

    def _load_all(self) -> None:
        if not self._is_complete:
            for module in self._modules():
                self._load(module)
            self._is_complete = True

    def _load_namesake(self, name: str) -> None:
        """Import the file that has the name of a class, if there is one."""
        if name not in self._registered and not self._is_complete:
            for module in self._modules():
                if module.replace("_", "") == name.lower():
                    self._load(module)

    def __getitem__(self, name: str) -> type[Method]:
        self._load_namesake(name)
        if name not in self._registered:
            self._load_all()
        return self._registered[name]

    def __setitem__(self, name: str, method: type[Method]) -> None:
        """Register a method; the class of a module that is run again takes its own place.

        Raises:
            ValueError: a method of another module has the name.
        """
        if not method.__module__.startswith(f"{self._package}."):
            self._load_namesake(name)
        known = self._registered.get(name)
        if known is not None and known.__module__ != method.__module__:
            raise ValueError(
                f"register_method: expected a name of its own, got {name} of {method.__module__}, "
                f"which {known.__module__} has; checkpoints name a method by its class, so give "
                "yours another name"
            )
        self._registered[name] = method

    def __delitem__(self, name: str) -> None:
        del self._registered[name]

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the alphabet, so that it does not depend on what ran before."""
        self._load_all()
        return iter(sorted(self._registered))

    def __len__(self) -> int:
        self._load_all()
        return len(self._registered)


METHODS = Methods("lightning_peft.methods")

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Make a method known by its class name: to checkpoints, Hugging Face exchange and the
    generated table.

    Raises:
        ValueError: a method of another module has the name.
    """
    METHODS[cls.__name__] = cls
    fmt = vars(cls).get("hf")
    if fmt is not None and fmt.own_defaults:
        cls.hf = dataclasses.replace(fmt, defaults={**_defaults(cls, fmt), **fmt.defaults})
    return checked_arguments(cls)


def _defaults(cls: type[Method], fmt: HFFormat) -> dict[str, Any]:
    """peft's keys → the defaults of our fields."""
    found = {}
    for f in dataclasses.fields(cast("type[Targeted]", cls)):
        if f.name in fmt.config:
            made = f.default_factory
            found[fmt.config[f.name]] = f.default if made is dataclasses.MISSING else made()
    return found


def to_dict(method: Method) -> dict[str, Any]:
    """A dict of plain data that `torch.load(weights_only=True)` takes; inverse of `from_dict`."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(cast(Targeted, method))}
    return {"method": type(method).__name__, **fields}


def from_dict(data: Mapping[str, Any]) -> Method:
    """The method that `to_dict` described.

    Raises:
        ValueError: unknown method or field, with the known ones.
    """
    fields = dict(data)
    name = fields.pop("method", None)
    cls = METHODS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(
            f"stored method: expected one of {sorted(METHODS)}, got {name!r}; import the module "
            "that registers it"
        )
    known = {f.name for f in dataclasses.fields(cast("type[Targeted]", cls))}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"stored {name}: expected fields {sorted(known)}, got also {unknown}; the file was "
            "written by a newer version"
        )
    try:
        return cls(**fields)
    except (TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(
            f"stored {name}: expected values that the method takes, got {str(fields)[:120]} "
            f"({error}); the file is damaged"
        ) from error
