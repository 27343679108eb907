"""The methods by name, and as plain data for checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from lightning_peft.methods.arguments import checked_arguments
from lightning_peft.methods.base import HFFormat, Method, Targeted

__all__ = ["METHODS", "from_dict", "register", "to_dict"]


METHODS: dict[str, type[Method]] = {}


M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Make a method known by its class name: to checkpoints, Hugging Face exchange and the
    generated table.
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
