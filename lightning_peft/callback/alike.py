"""Whether all processes train the same thing: asked before the first step, answered together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import nn

from lightning_peft.methods.base import to_plain
from lightning_peft.record import records_in
from lightning_peft.strategies.agreeing import raise_together, require_same

__all__ = ["attached_alike", "require_same_configuration"]


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
        for key, value in to_plain(method).items()
    }
    said |= {
        "quantization": str(None if quantization is None else dataclasses.asdict(quantization)),
        "optimizer": str(peft.optimizer),
        "modules_to_save": str(peft.modules_to_save),
        "root": str(peft.root),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    require_same(said, "PEFT", "start every process from the same script and environment")


@contextmanager
def attached_alike(module: nn.Module) -> Iterator[None]:
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
    raise_together(error, "PEFT attach")
    seen: dict[str, Any] = {}
    for prefix, _, record in records_in(module):
        base = (record.fingerprint or {}).get("tensors", {})
        for name, (shape, dtype, content) in base.items():
            at = f"{prefix}.{name}" if prefix else name
            seen[f"base {at}"] = f"{shape} {dtype} content {content}"
    for name, p in module.named_parameters():
        if p.requires_grad:
            seen[f"trained {name}"] = f"{list(p.shape)} {p.dtype}"
    require_same(
        seen,
        "PEFT",
        "load the same pretrained weights everywhere; a layer that is drawn afresh needs "
        "seed_everything, or a place in modules_to_save",
    )
