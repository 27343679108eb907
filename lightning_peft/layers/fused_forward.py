"""Fused forms of an adapted forward: base and change in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lightning_peft_kernels.autograd import in_functorch_transform
from lightning_peft_kernels.dispatch import current_backend
from torch import Tensor, nn

from lightning_peft.core.edit import Edit, low_rank_terms
from lightning_peft.core.protocols import Reason
from lightning_peft.core.terms import FusedLinearTerm, concat_ranks
from lightning_peft.layers.weight_adapter import WeightAdapter

if TYPE_CHECKING:
    from lightning_peft.layers.base import MatrixOps

__all__ = ["forward_fused"]

_LOW_RANK = frozenset({"low_rank"})
_DROPPED_LOW_RANK = frozenset({"low_rank", "dropout"})
_SCALED_LOW_RANK = frozenset({"low_rank", "out_scale"})


def forward_fused(
    ops: MatrixOps,
    m: nn.Module,
    adapters: Sequence[WeightAdapter],
    edits: Sequence[Edit],
    x: Tensor,
) -> Tensor | None:
    """Return the output of a fused form of these edits; None if there is none."""
    y: Tensor | None = None
    alone = edits[0] if len(edits) == 1 else None
    if alone is not None and alone.fused_linear_term is not None:
        y = _fused_linear(ops, m, adapters[0], alone.fused_linear_term, x)
    if y is None and all(e.only_low_rank for e in edits):
        y = _fused_low_rank(m, adapters, edits, x)
    if y is None and alone is not None and alone.form() - {"dropout"} == _SCALED_LOW_RANK:
        y = _fused_then_scaled(ops, m, adapters[0], alone, x)
    return y


def _fused_linear(
    ops: MatrixOps, m: nn.Module, adapter: WeightAdapter, term: FusedLinearTerm, x: Tensor
) -> Tensor | None:
    """Return base and change from the term's own function.

    None unless the layer is linear and dense, all tensors have one dtype, and the backend may
    be another than torch.
    """
    site = adapter.site
    formed = getattr(term, "formed", False)  # torch's own formula already
    if (
        (not formed and (current_backend() == "torch" or in_functorch_transform()))
        or site.storage.is_quantized
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    if isinstance(site.storage.fused(_LOW_RANK, m, site.parameter), Reason):
        return None
    W = ops.to_canonical(m, site.parameter, ops.own(m, site.parameter))
    b, dtype = ops.bias_of(m), x.dtype
    if W.requires_grad or (b is not None and b.requires_grad) or dtype.itemsize < 4:
        return None
    if W.dtype != dtype or any(
        t.dtype != dtype for t in adapter.tensors().values() if t.is_floating_point()
    ):
        return None
    return term.fused_linear(x, W, b)


def _fused_low_rank(
    m: nn.Module, adapters: Sequence[WeightAdapter], edits: Sequence[Edit], x: Tensor
) -> Tensor | None:
    p = edits[0].dropout
    if len(edits) > 1 and any(e.dropout != p for e in edits):
        return None
    site = adapters[0].site
    kernel = site.storage.fused(_DROPPED_LOW_RANK if p else _LOW_RANK, m, site.parameter)
    if isinstance(kernel, Reason):
        return None
    term = concat_ranks(low_rank_terms(edits))
    return kernel(m, x, term.A, term.B, term.scaling, p if m.training else 0.0)


def _fused_then_scaled(
    ops: MatrixOps, m: nn.Module, adapter: WeightAdapter, edit: Edit, x: Tensor
) -> Tensor | None:
    """Return DoRA's form: the fused layer, then one pass for the scale.

    Returns None if the layer has a bias: the scale does not apply to the bias, but the fused layer
    would round it into the sum.
    """
    if ops.bias_of(m) is not None or not ops.supports("out_scale") or edit.out_scale is None:
        return None
    u = _fused_low_rank(m, [adapter], [replace(edit, out_scale=None)], x)
    return None if u is None else ops.scale_out(m, u, edit.out_scale)
