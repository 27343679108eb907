"""Descriptions of torchao's tensors in safetensors metadata, as torchao's own loader reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch

__all__ = ["described"]


def described(name: str, attributes: Mapping[str, Any], parts: Sequence[str]) -> str:
    """JSON of a tensor.

    Args:
        name: Name of its class.
        attributes: What ``__tensor_flatten__`` returned beside the names of the parts.
        parts: Names of the tensors that the files hold.
    """
    return json.dumps({**_typed(name, attributes), "_tensor_data_names": list(parts)})


def _typed(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"_type": name, "_data": {key: _plain(value) for key, value in values.items()}}


def _plain(value: Any) -> Any:
    name = type(value).__name__
    if isinstance(value, torch.dtype):
        return {"_type": "torch.dtype", "_data": str(value).removeprefix("torch.")}
    if isinstance(value, Enum):
        return {"_type": name, "_data": value.name}
    if is_dataclass(value) and not isinstance(value, type):
        return _typed(name, {f.name: getattr(value, f.name) for f in fields(value)})
    if hasattr(value, "_asdict"):
        return _typed(name, value._asdict())
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
