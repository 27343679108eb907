"""How the bits of a frozen weight are held: the storages, and how to register one."""

from __future__ import annotations

from lightning_peft.storage import bitsandbytes as _bitsandbytes  # registers its storages
from lightning_peft.storage.config import Quantization, StorageConfig
from lightning_peft.storage.nf4 import storage as _nf4  # registers its storages
from lightning_peft.storage.quantized import QuantizedStorage
from lightning_peft.storage.registry import (
    HeldTensor,
    as_config,
    config_from_dict,
    config_to_dict,
    foreign_storage,
    held_tensors,
    register_storage,
    require_config,
    storage_for,
    storage_of,
)

__all__ = [
    "HeldTensor",
    "Quantization",
    "QuantizedStorage",
    "StorageConfig",
    "as_config",
    "config_from_dict",
    "config_to_dict",
    "foreign_storage",
    "held_tensors",
    "register_storage",
    "require_config",
    "storage_for",
    "storage_of",
]

del _bitsandbytes, _nf4
