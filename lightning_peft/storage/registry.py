"""The storages by configuration type and by the weights they hold.

A storage from outside the package is one class under `register_storage`:

    @register_storage(MyConfig)
    class MyStorage(QuantizedStorage): ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import nn

from lightning_peft.core.protocols import Storage
from lightning_peft.core.value_types import shown
from lightning_peft.storage.block_scaled import BlockScaledStorage
from lightning_peft.storage.config import Quantization, StorageConfig
from lightning_peft.storage.dense import DenseStorage
from lightning_peft.storage.packed import specs_of
from lightning_peft.storage.quantized import QuantizedStorage

__all__ = [
    "HeldTensor",
    "as_config",
    "config_from_dict",
    "config_to_dict",
    "foreign_storage",
    "held_tensors",
    "register_storage",
    "released_formats",
    "released_methods",
    "require_config",
    "storage_for",
    "storage_of",
]

_DENSE = DenseStorage()

#: Type of the configuration (None if the format only arrives) and storage, latest first.
_STORAGES: list[tuple[type[StorageConfig] | None, Storage]] = []

#: Those of them that find the weights they hold in a way of their own.
_WITHOUT_SPECIFICATION: list[tuple[type[StorageConfig] | None, Storage]] = []

S = TypeVar("S")


def register_storage(config_type: type[StorageConfig] | None = None) -> Callable[[S], S]:
    """Class decorator: make a storage known to everything that reads or quantises weights.

    Several storages may share a configuration type; `Storage.accepts` tells them apart.

    Args:
        config_type: Configuration that asks for the storage in ``quantization=``; None for a
            format that is only found in models that arrive quantised.
    """

    def register(cls: S) -> S:
        storage: Any = cast("type[Any]", cls)()
        again = [e for e in _STORAGES if _same_name(type(e[1]), cast("type[Any]", cls))]
        for entry in again:
            _STORAGES.remove(entry)
        _STORAGES.insert(0, (config_type, storage))
        _WITHOUT_SPECIFICATION[:] = [e for e in _STORAGES if not _reads_specification(e[1])]
        return cls

    return register


def _reads_specification(storage: Storage) -> bool:
    """Whether a storage holds only weights of modules with a specification (`specs_of`)."""
    return getattr(type(storage), "weights", None) is QuantizedStorage.weights


def _same_name(one: type, other: type) -> bool:
    """Whether a module was reloaded, so that its class replaces the earlier one."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def storage_of(module: nn.Module, name: str = "weight") -> Storage:
    """The storage that holds this weight; dense if no other one does."""
    for _, storage in _STORAGES:
        if storage.owns(module, name):
            return storage
    return _DENSE


def storage_for(config: StorageConfig) -> Storage:
    """The storage that quantises under this configuration.

    Raises:
        TypeError: no registered storage takes it.
    """
    for config_type, storage in _STORAGES:
        if config_type is not None and isinstance(config, config_type) and storage.accepts(config):
            return storage
    raise TypeError(
        f"quantization: expected one of {sorted(_config_types())}, got {shown(config)}; register "
        "the storage of another type with register_storage"
    )


def foreign_storage(module: nn.Module) -> Storage | None:
    """The storage that can adopt a layer of another library; None for all other layers."""
    return next((storage for _, storage in _STORAGES if storage.matches(module)), None)


def released_formats(config: Mapping[str, Any]) -> list[BlockScaledStorage]:
    """The storages that read checkpoints with this ``quantization_config``."""
    return [s for s in _released() if s.reads(config)]


def released_methods() -> list[str]:
    """Values of ``quant_method`` that `load_packed` knows."""
    return sorted({name for s in _released() for name in s.quant_methods})


def _released() -> list[BlockScaledStorage]:
    return [s for _, s in _STORAGES if isinstance(s, BlockScaledStorage)]


@dataclasses.dataclass(frozen=True)
class HeldTensor:
    """One parameter or buffer of a module that holds a quantised weight, or a part of one.

    Attributes:
        storage: The storage.
        weight: Name of the weight.
        role: ``"codes"``, or the companion's role.
    """

    storage: Storage
    weight: str
    role: str


def held_tensors(module: nn.Module) -> dict[str, HeldTensor]:
    """The tensors of a module that quantising storages hold, by name; empty for a dense one."""
    storages = _STORAGES if specs_of(module) else _WITHOUT_SPECIFICATION
    return {
        t.key: HeldTensor(storage, name, t.role)
        for _, storage in storages
        for name in storage.weights(module)
        for t in storage.iter_tensors(module, name)
        if t.key is not None
    }


# ---- configurations


def _config_types() -> dict[str, type[StorageConfig]]:
    return {cls.__name__: cls for cls, _ in _STORAGES if cls is not None}


def as_config(quantization: StorageConfig | str | None) -> StorageConfig | None:
    """A configuration; a string is the kind of a `Quantization`.

    Raises:
        TypeError: something else, for instance a class.
    """
    return None if quantization is None else require_config(quantization)


def require_config(quantization: StorageConfig | str) -> StorageConfig:
    """`as_config` where there must be one."""
    if isinstance(quantization, str):
        return Quantization(cast("Any", quantization))  # checked there
    if not isinstance(quantization, StorageConfig):
        raise TypeError(
            f"quantization: expected a kind such as 'nf4', or a configuration such as "
            f"Quantization('nf4'), got {shown(quantization)}; write quantization='nf4'"
        )
    return quantization


def config_to_dict(config: StorageConfig | None) -> dict[str, Any] | None:
    """Plain data that `torch.load(weights_only=True)` takes; inverse of `config_from_dict`.

    A `Quantization` is its fields alone, as checkpoints have always held it.
    """
    if config is None:
        return None
    fields = dataclasses.asdict(cast(Any, config))
    return fields if type(config) is Quantization else {"storage": type(config).__name__, **fields}


def config_from_dict(data: Mapping[str, Any] | None) -> StorageConfig | None:
    """The configuration that `config_to_dict` described.

    Raises:
        ValueError: an unknown type or field.
    """
    if data is None:
        return None
    fields = dict(data)
    name = fields.pop("storage", Quantization.__name__)
    cls = _config_types().get(name)
    if cls is None:
        raise ValueError(
            f"stored quantization: expected one of {sorted(_config_types())}, got {name!r}; import "
            "the module that registers its storage"
        )
    known = {f.name for f in dataclasses.fields(cast(Any, cls))}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"stored quantization {name}: expected fields {sorted(known)}, got also {unknown}; the "
            "file was written by a newer version"
        )
    return cls(**fields)
