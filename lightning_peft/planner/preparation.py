"""Brings a meta model to what is trained: dtypes, packed weights and adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_peft.adapters.adoption import adopted_layers
from lightning_peft.adapters.attach import attach
from lightning_peft.adapters.quantize import plan_quantization
from lightning_peft.core.modules import parameter_at
from lightning_peft.methods.base import Method
from lightning_peft.storage import StorageConfig, storage_for

__all__ = ["PRECISIONS", "Unmade", "prepare"]

#: Precision → (dtype of the base, None as the module has it; dtype of what is trained; autocast)
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype, torch.dtype | None]] = {
    "bf16": (torch.bfloat16, torch.float32, torch.bfloat16),
    "16": (torch.float16, torch.float32, torch.float16),
    "bf16-mixed": (None, torch.float32, torch.bfloat16),
    "16-mixed": (None, torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16, None),
    "16-true": (torch.float16, torch.float16, None),
    "32-true": (torch.float32, torch.float32, None),
}


@dataclass(frozen=True)
class Unmade:
    """Weights that a storage would hold, were there values to quantise.

    Attributes:
        label: The storage's label.
        nbytes: Bytes by id of the dense parameter.
    """

    label: str = ""
    nbytes: dict[int, int] = field(default_factory=dict)


def prepare(
    model: nn.Module,
    methods: Sequence[Method] | None,
    quantization: StorageConfig | None,
    precision: str,
    modules_to_save: Sequence[str] = (),
) -> Unmade:
    """Bring a meta model to what is trained, in place; `methods` None is plain full fine-tuning.

    Returns:
        What a storage that quantises values only would hold; its weights stay dense here.
    """
    base, trained, _ = PRECISIONS[precision]
    with adopted_layers(model):  # before a cast would reach their scales
        return _prepare(model, methods, quantization, base, trained, modules_to_save)


def _prepare(
    model: nn.Module,
    methods: Sequence[Method] | None,
    quantization: StorageConfig | None,
    base: torch.dtype | None,
    trained: torch.dtype,
    modules_to_save: Sequence[str],
) -> Unmade:
    unmade = Unmade()
    if methods is None:
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
    if base is not None:
        model.to(base)
    if methods is not None:
        if quantization is not None and not storage_for(quantization).quantizes_meta:
            unmade = _unmade(model, quantization, modules_to_save)
            quantization = None
        attach(
            model,
            [_plain_start(m) for m in methods],
            quantization=quantization,
            modules_to_save=modules_to_save,
        )
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = p.data.to(trained)
    return unmade


def _unmade(
    model: nn.Module, quantization: StorageConfig, modules_to_save: Sequence[str]
) -> Unmade:
    plan = plan_quantization(model, quantization, keep=list(modules_to_save))
    nbytes = {}
    for _, module, layout in plan.layers:
        for name in layout.names:
            W = parameter_at(module, name)
            shape = W.mT.shape if layout.transposed else W.shape
            bits = plan.storage.bits_per_weight(shape, quantization)
            nbytes[id(W)] = round(W.numel() * bits / 8)
    return Unmade(plan.storage.label, nbytes)


def _plain_start(method: Method) -> Method:
    """Start values do not matter here, and there are no weights to take them from."""
    named = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    if getattr(method, "rewrites_base", False) and "init" in named:
        try:
            return dataclasses.replace(method, init="default")  # type: ignore[type-var]
        except ValueError:  # its starts have other names
            return method
    return method
