"""Checks that all ranks hold the same base and train the same tensors."""

from __future__ import annotations

from torch import nn

from lightning_peft.core.collectives import check_same_on_all_ranks
from lightning_peft.core.registry import registries_in

__all__ = ["check_same_model"]


def check_same_model(module: nn.Module) -> None:
    """Compare fingerprints of the bases, and shapes and dtypes of trained parameters.

    The frozen base is never sent between ranks, so a difference would go unnoticed.

    Raises:
        RuntimeError: on every rank, with the first tensors that differ.
    """
    seen: dict[str, str] = {}
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
        "load the same pretrained weights everywhere; a layer with fresh random weights needs "
        "seed_everything, or a place in modules_to_save",
    )
