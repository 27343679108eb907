"""Whether all processes train the same thing: asked before the first step, answered together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import nn

from lightning_peft.core.registry import registries_in
from lightning_peft.methods.registry import to_dict
from lightning_peft.strategies.collectives import check_same_on_all_ranks, raise_on_all_ranks

__all__ = ["require_same_configuration", "verify_consistent_attach"]


def require_same_configuration(peft: Any) -> None:
    """Compare what the callback was given, and versions.

    Raises:
        RuntimeError: on every process, with what differs.
    """
    quantization = peft.quantization
    said = {
        f"adapter {name!r}, method {i}, {key}": str(value)
        for name, methods in peft.adapters.items()
        for i, method in enumerate(methods)
        for key, value in to_dict(method).items()
    }
    said |= {
        "quantization": str(None if quantization is None else dataclasses.asdict(quantization)),
        "optimizer": str(peft.optimizer),
        "modules_to_save": str(peft.modules_to_save),
        "root": str(peft.root),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    check_same_on_all_ranks(
        said, "PEFT", "start every process from the same script and environment"
    )


@contextmanager
def verify_consistent_attach(module: nn.Module) -> Iterator[None]:
    """Round attaching: an error on one process is one on all; afterwards bases and adapters are
    compared.

    Raises:
        RuntimeError: on every process, with the first tensors that differ.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, "PEFT attach")
    seen: dict[str, Any] = {}
    for prefix, _, record in registries_in(module):
        base = (record.fingerprint or {}).get("tensors", {})
        for name, (shape, dtype, content) in base.items():
            at = f"{prefix}.{name}" if prefix else name
            seen[f"base {at}"] = f"{shape} {dtype} content {content}"
    for name, p in module.named_parameters():
        if p.requires_grad:
            seen[f"trained {name}"] = f"{list(p.shape)} {p.dtype}"
    check_same_on_all_ranks(
        seen,
        "PEFT",
        "load the same pretrained weights everywhere; a layer that is drawn afresh needs "
        "seed_everything, or a place in modules_to_save",
    )
