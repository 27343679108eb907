"""Provenance of an adapter: the base's fingerprint and storage, in the file's header.

Other programs ignore the header of a safetensors file, so a peft directory can carry it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.core.names import join, strip_compile
from lightning_peft.core.registry import registries_in
from lightning_peft.hf.files import opened
from lightning_peft.storage import StorageConfig, config_from_dict, config_to_dict

__all__ = ["Provenance", "provenance_of", "read_provenance"]

_KEY = "lightning_peft"


@dataclass(frozen=True)
class Provenance:
    """The base of an adapter.

    Attributes:
        quantization: How the base was stored in training; None for dense or unknown.
        tensors: [shape, dtype, content hash] by name; empty if unknown.
    """

    quantization: StorageConfig | None = None
    tensors: Mapping[str, tuple[list[int], str, str]] = field(default_factory=dict)


def provenance_of(model: nn.Module, adapter_name: str, prefix: str) -> dict[str, str]:
    """Return the header for an adapter; names are relative to `prefix`."""
    for at, _, registry in registries_in(model):
        if adapter_name in registry.adapters and registry.fingerprint is not None:
            named = {
                join(strip_compile(at), n): t for n, t in registry.fingerprint["tensors"].items()
            }
            start = f"{prefix}." if prefix else ""
            described = {
                "quantization": config_to_dict(registry.quantization),
                "base": {n[len(start) :]: t for n, t in named.items() if n.startswith(start)},
            }
            return {_KEY: json.dumps(described)}
    return {}


def read_provenance(file: Path) -> Provenance:
    """Return what the header of a safetensors file says; empty for another program's file.

    Raises:
        ValueError: a header of ours that does not read.
    """
    with opened(file) as handle:
        text = (handle.metadata() or {}).get(_KEY)
    if text is None:
        return Provenance()
    try:
        described: dict[str, Any] = json.loads(text)
        tensors = {n: (list(s), str(d), str(h)) for n, (s, d, h) in described["base"].items()}
        return Provenance(config_from_dict(described["quantization"]), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a description of the base in the header, got something else "
            f"({error}); save the adapter again"
        ) from None
