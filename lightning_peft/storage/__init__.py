"""Where the frozen weight lives. `storage_of` finds the storage of a weight; `Quantization` asks
for one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.core.protocols import Storage
from lightning_peft.storage.config import Quantization
from lightning_peft.storage.dense import DenseStorage
from lightning_peft.storage.nf4.storage import FourBitStorage

__all__ = ["Quantization", "storage_of"]

_DENSE = DenseStorage()
_FOUR_BIT: dict[str, Storage] = {"nf4": FourBitStorage("nf4"), "fp4": FourBitStorage("fp4")}


def storage_of(module: nn.Module, name: str = "weight") -> Storage:
    """The storage that owns this weight."""
    packed: Any = vars(module).get("_packed")
    if packed is not None and name in packed:
        return _FOUR_BIT[packed[name].kind]
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes."):
            return _bitsandbytes(cls.__name__)
    return _DENSE


def _bitsandbytes(class_name: str) -> Storage:
    from lightning_peft.storage import bitsandbytes

    storages: dict[str, Storage] = {
        "Linear4bit": bitsandbytes.Bnb4bitStorage(),
        "LinearNF4": bitsandbytes.Bnb4bitStorage(),
        "LinearFP4": bitsandbytes.Bnb4bitStorage(),
        "Linear8bitLt": bitsandbytes.Bnb8bitStorage(),
    }
    if class_name not in storages:
        raise ValueError(
            f"bitsandbytes.{class_name}: expected one of {sorted(storages)}; exclude the layer "
            "with exclude_modules"
        )
    return storages[class_name]
