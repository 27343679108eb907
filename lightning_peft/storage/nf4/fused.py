"""Products with packed layers and LoRA in one op: one layer, or several over one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_peft_kernels.fp8.linear import fp8_lora_linear
from lightning_peft_kernels.nf4.linear import nf4_lora_linear
from lightning_peft_kernels.nf4.projections import Projection, nf4_grouped_projections
from lightning_peft_kernels.nf4.selection import select_group
from torch import Tensor

from lightning_peft.core.class_swap import base_class
from lightning_peft.core.modules import own_tensor
from lightning_peft.core.protocols import Reason
from lightning_peft.storage.linear_forward import plain_forward, require_floating
from lightning_peft.storage.nf4.packed_layer import FourBitSpec, Packed4bitModule, packed_view

__all__ = ["fused", "fused_group"]


def fused(
    m: Packed4bitModule, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float
) -> Tensor:
    """The adapted layer on x; `dropout` is 0 in evaluation."""
    p = m._packed["weight"]
    if not x.is_floating_point():
        require_floating(m, x)
    q = packed_view(m, "weight")
    bias = own_tensor(m, "bias")
    how: dict[str, Any] = {
        "kind": p.kind, "block_size": p.block_size, "dropout_p": dropout,
    }  # fmt: skip
    if p.compute == "fp8" and p.uses_fp8(x.device):
        return fp8_lora_linear(x, q, p.shape, p.e4m3_scale(q), bias, A, B, scaling, **how)
    z = p.rounded(x) if p.compute == "bf16" else x
    y = nf4_lora_linear(z, q, p.shape, bias, A, B, scaling, **how)
    return y if z is x else y.to(x.dtype)


def fused_group(
    modules: Sequence[Any], x: Tensor | None, factors: Sequence[tuple[Any, float]] | None
) -> list[Tensor] | Reason:
    """Outputs of every module on x.

    Args:
        modules: Linear layers whose ``weight`` is packed.
        x: Their common input, or None before the first call.
        factors: (LowRank, dropout) of each; None to ask for the decision alone.
    """
    first: FourBitSpec = modules[0]._packed["weight"]
    weights = [m._parameters["weight"] for m in modules]
    device, dtype = (weights[0].device, first.dtype) if x is None else (x.device, x.dtype)
    tokens = None if x is None else x.numel() // max(1, x.shape[-1])
    shapes = [tuple(m._packed["weight"].shape) for m in modules]
    decision = select_group(device, dtype, tokens, shapes)
    if decision.backend == "apart":
        return Reason(decision.reason)
    why = _different(modules, weights, device, first)
    if why:
        return Reason(why)
    if x is None or factors is None:
        return []
    if len({t.dtype for term, _ in factors for t in (term.A, term.B)}) > 1:
        return Reason("adapters of several dtypes")
    layers = [
        Projection(
            packed_view(m, "weight"), shape, own_tensor(m, "bias"), t.A, t.B, t.scaling, dropout
        )
        for m, shape, (t, dropout) in zip(modules, shapes, factors, strict=True)
    ]
    return nf4_grouped_projections(x, layers, kind=first.kind, block_size=first.block_size)


def _different(
    modules: Sequence[Any],
    weights: Sequence[Tensor],
    device: torch.device,
    first: FourBitSpec,
) -> str:
    """What keeps the layers apart; "" where nothing does."""
    for m, weight in zip(modules, weights, strict=True):
        p: FourBitSpec = m._packed["weight"]
        if hasattr(weight, "to_local") or weight.device != device:
            return "a weight is elsewhere until its own layer runs"
        if p.compute != "auto" and (p.compute == "bf16" or p.uses_fp8(device)):
            return f"{p.compute}: layer by layer"
        if (p.kind, p.block_size) != (first.kind, first.block_size):
            return "packed in different ways"
        if not plain_forward(m):
            return f"{base_class(m).__name__} has a forward of its own"
    return ""
