"""How the bits of a frozen weight are held: the storages, and how to register one."""

from __future__ import annotations

from lightning_peft.storage import awq_gptq as _awq_gptq
from lightning_peft.storage import compressed_tensors as _compressed_tensors
from lightning_peft.storage import fp8 as _fp8
from lightning_peft.storage import modelopt as _modelopt
from lightning_peft.storage import mxfp4 as _mxfp4
from lightning_peft.storage import torchao as _torchao

# These modules register their storages.
from lightning_peft.storage.bitsandbytes import eight_bit as _eight_bit
from lightning_peft.storage.bitsandbytes import four_bit as _four_bit
from lightning_peft.storage.config import Quantization, StorageConfig
from lightning_peft.storage.nf4 import storage as _nf4
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

del _awq_gptq, _compressed_tensors, _eight_bit, _four_bit, _fp8, _modelopt, _mxfp4, _nf4, _torchao
