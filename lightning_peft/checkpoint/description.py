"""The description of adapters that a checkpoint holds beside the tensors, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from typing import Any

from torch import nn

from lightning_peft.adapters.intact import check_intact
from lightning_peft.adapters.rehome import seen_from
from lightning_peft.checkpoint.kept import kept_base_tensors
from lightning_peft.core.names import strip_compile
from lightning_peft.core.registry import AdapterEntry, AdapterRegistry, registries_in
from lightning_peft.methods.registry import to_dict
from lightning_peft.storage import config_to_dict

__all__ = ["FORMAT", "KEY", "describe", "is_attached"]

#: Top-level key of a checkpoint under which everything of ours stands.
KEY = "lightning_peft"
#: Version of that entry; a file with a larger one was written by newer code.
#: 1: adapters, and what outside of the root required a gradient when the file was written.
#: 2: also `kept`, the names of all tensors in the file that belong to no adapter.
#: 3: also the marker among the tensors (see `core.marker`).
#: 4: the state of Python's generator holds its words as a tensor.
FORMAT = 4

_PACKAGES = (
    "lightning_peft",
    "lightning",
    "pytorch-lightning",
    "torch",
    "transformers",
    "bitsandbytes",
)


def is_attached(model: nn.Module) -> bool:
    """Whether any adapter is attached below `model`."""
    return any(record.adapters for _, _, record in registries_in(model))


def describe(model: nn.Module, kept: Iterable[str] | None = None) -> dict[str, Any]:
    """Plain data about every adapter in `model`: what `torch.load(weights_only=True)` takes.

    Args:
        model: The model.
        kept: Names of the tensors in the file that belong to no adapter; None finds them.
    """
    check_intact(model, "checkpoint")
    roots = {
        strip_compile(prefix): _describe_root(seen_from(root, registry))
        for prefix, root, registry in registries_in(model)
        if registry.adapters
    }
    names = sorted(kept_base_tensors(model) if kept is None else kept)
    return {"format": FORMAT, "versions": _versions(), "roots": roots, "kept": names}


def _describe_root(record: AdapterRegistry) -> dict[str, Any]:
    return {
        "adapters": {name: _describe_adapter(entry) for name, entry in record.adapters.items()},
        "active": list(record.active),
        "quantization": config_to_dict(record.quantization),
        "fingerprint": record.fingerprint,
    }


def _describe_adapter(entry: AdapterEntry) -> dict[str, Any]:
    separate = {"separate_copies": True} if entry.separate_copies else {}
    return {
        **separate,
        "methods": [to_dict(m) for m in entry.methods],
        "modules_to_save": [strip_compile(name) for name in entry.modules_to_save],
        "sites": [
            [strip_compile(label), list(shape), method] for label, shape, method in entry.sites
        ],
    }


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
