"""Forward of a fused experts module with edits on its weights.

Token–expert pairs sorted by expert, grouped products, the module's own gate, biases, norm and
routing weights. Low rank runs on routed tokens only; ΔW [E, out, in] is never formed. Where pairs
of each expert end is known on the device: on CUDA nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning_peft_kernels.autograd import apply_or_forward, in_functorch_transform
from lightning_peft_kernels.dropout.ops import dropout
from lightning_peft_kernels.experts.grouped_linear import Groups, grouped_linear
from lightning_peft_kernels.experts.low_rank import add_low_rank
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.core.edit import Edit, apply_edits
from lightning_peft.layers.adapted import is_adapted
from lightning_peft.layers.experts.routing import FromSorted, Presorted, Routing, ToSorted
from lightning_peft.layers.experts.structure import (
    FusedExperts,
    first_weight,
    form_of,
    has_bias,
    is_presorted,
    is_transposed,
)
from lightning_peft.layers.mixed_batch import current_mixed_batch, saves_for_recomputation
from lightning_peft.layers.weight_adapter import WeightAdapter
from lightning_peft.storage import storage_of

__all__ = ["run_experts"]


def run_experts(
    module: nn.Module, adapters: Sequence[WeightAdapter], inputs: tuple[Any, ...]
) -> Tensor:
    """Forward of a fused experts module.

    Args:
        module: The module.
        adapters: Active adapters of its weights, in order.
        inputs: (hidden states [T, d], expert indices [T, k], routing weights [T, k]); hidden states
            alone where they come sorted.
    """
    m = cast(FusedExperts, module)
    by_weight: dict[str, list[WeightAdapter]] = {}
    for adapter in adapters:
        by_weight.setdefault(adapter.site.parameter, []).append(adapter)
    if is_presorted(m):
        return _run_presorted(m, by_weight, inputs[0])
    x, index, weights = inputs[:3]
    routing = Routing(m, index)
    _note(m, routing.groups)
    rows = _mask_of_rows(adapters, x.shape[0], routing)
    first, form = first_weight(m), form_of(m)
    assert form is not None  # `is_experts` said so
    h = apply_or_forward(ToSorted, x, routing.token, routing.inverse)
    h = _product(m, first, h, routing, by_weight.get(first, ()), rows)
    h = m._apply_gate(h) if form.has_gate else m.act_fn(h)
    h = _product(m, "down_proj", h, routing, by_weight.get("down_proj", ()), rows)
    if routing.unassigned is not None:
        h = h.masked_fill(routing.unassigned, 0.0)
    if form.has_norm:
        h = m.post_expert_norm(h)
    h = apply_or_forward(FromSorted, h, routing.order, routing.inverse)
    h = h.view(*index.shape, h.shape[-1]) * weights.reshape(*index.shape, 1)
    y: Tensor = h.sum(dim=1).to(x.dtype)
    return y


def _run_presorted(
    m: FusedExperts, by_weight: Mapping[str, Sequence[WeightAdapter]], x: Tensor
) -> Tensor:
    h = x.reshape(-1, x.shape[-1])
    routing = Presorted(m, h.shape[0])
    if by_weight and current_mixed_batch() is not None:
        raise ValueError(
            f"{type(m).__name__}: expected one adapter for all rows of the batch, got "
            "adapter_names: its input is sorted by expert; run the adapters one after the other"
        )
    gate, up = _product(m, "gate_up_proj", h, routing, by_weight.get("gate_up_proj", ()), {}).chunk(
        2, dim=-1
    )
    h = up * m.act_fn(gate)
    return _product(m, "down_proj", h, routing, by_weight.get("down_proj", ()), {})


def _note(m: FusedExperts, groups: Groups) -> None:
    """Count tokens of training for the report, until it was made.

    Modes say nothing (Hugging Face models are trained in eval mode too), so gradients do. The
    reentrant checkpoint has them in its second run alone, the other one in both.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    telemetry = m._peft.telemetry if is_adapted(m) else None
    if telemetry is None or not telemetry.counts_tokens:
        return
    in_backward = torch._C._current_graph_task_id() >= 0
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if not in_backward or not saves_for_recomputation(hooks):
        seen = telemetry.expert_tokens
        telemetry.expert_tokens = groups.sizes if seen is None else seen + groups.sizes


def _mask_of_rows(
    adapters: Sequence[WeightAdapter], tokens: int, routing: Routing
) -> dict[str, Tensor]:
    """Return, by adapter name, which pairs' tokens it acts on [S, 1].

    Empty if every row uses the same adapters.
    """
    mix = current_mixed_batch()
    if mix is None:
        return {}
    masks = {}
    for name in {a.adapter_name for a in adapters}:
        mask = torch.zeros(tokens, 1, dtype=torch.bool, device=routing.token.device)
        mask[mix.index(name, tokens, mask.device)] = True
        masks[name] = mask[routing.token]
    return masks


def _product(
    m: FusedExperts,
    name: str,
    x: Tensor,
    routing: Routing,
    adapters: Sequence[WeightAdapter],
    rows: Mapping[str, Tensor],
) -> Tensor:
    """One grouped linear layer with its edits: an onion around one base product."""
    edits = [a.edit() for a in adapters]
    masks = [rows.get(a.adapter_name) for a in adapters]
    if not all(e.on_experts for e in edits):
        bias = _bias(m, name, routing)
        return _forward_materialized(m, name, x, routing, adapters, edits, bias, rows)
    inputs = [x] * len(edits)
    for i in reversed(range(len(edits))):
        scale = edits[i].in_scale
        if scale is not None:
            x = _where(masks[i], x * _by_pair(scale, routing).to(x.dtype), x)
        inputs[i] = x
    y = _base(m, name, x, routing)
    bias = _bias(m, name, routing)
    if bias is not None:
        # In place, and dropped at once: tensors of this size between those that autograd keeps
        # leave holes in malloc's heap.
        added = bias.to(y.dtype)
        y = y + added if in_functorch_transform() else y.add_(added)
        del added
        if all(e.out_scale is None or e.scale_bias for e in edits):
            bias = None
    for e, z, mask in zip(edits, inputs, masks, strict=True):
        v, grouped = y, _Grouped(routing, in_place=mask is None)
        keep = bias if e.out_scale is not None and not e.scale_bias else None
        if keep is not None:
            v = v - keep
        for term in e.terms:
            drop = dropout(z, e.dropout) if e.dropout and m.training else z
            v = term.add_grouped(v, drop, grouped)  # type: ignore[attr-defined]
        if e.bias is not None and (e.scale_bias or e.out_scale is None):
            v = v + _by_pair(e.bias, routing).to(v.dtype)
        if e.out_scale is not None:
            v = v * _by_pair(e.out_scale, routing).to(v.dtype)
        if keep is not None:
            v = v + keep
        y = _where(mask, v, y)
    return y


def _bias(m: FusedExperts, name: str, routing: Routing) -> Tensor | None:
    """Bias of each pair [S, n]."""
    return getattr(m, f"{name}_bias")[routing.expert] if has_bias(m) else None


def _where(mask: Tensor | None, yes: Tensor, no: Tensor) -> Tensor:
    return yes if mask is None else torch.where(mask, yes, no)


def _by_pair(v: Tensor, routing: Routing) -> Tensor:
    """[E, n] → [S, n]; a vector shared by all experts stays."""
    return v[routing.expert] if v.ndim == 2 else v


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to autocast's dtype if it is on: grouped products do not cast by themselves."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _base(m: FusedExperts, name: str, x: Tensor, routing: Routing) -> Tensor:
    (x,) = _autocast(x)
    storage = storage_of(m, name)
    if storage.is_quantized:
        return storage.grouped_linear(m, name, x, routing.groups)
    W = getattr(m, name)
    return grouped_linear(x, W.mT if is_transposed(m) else W, routing.groups)


class _Grouped:
    """The products that terms are given; see `terms.Grouped`."""

    def __init__(self, routing: Routing, *, in_place: bool) -> None:
        self._groups = routing.groups
        self._in_place = in_place

    def product(self, x: Tensor, W: Tensor, times: int = 1) -> Tensor:
        (W,) = _autocast(W)
        x = x.to(W.dtype)
        if W.ndim == 2:  # shared by all experts
            return F.linear(x, W)
        return grouped_linear(x, W, self._groups if times == 1 else self._groups.times(times))

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor
    ) -> Tensor:
        if A.ndim == 2 or B.ndim == 2:
            return y + self.product(self.product(x, A) * scaling, B).to(y.dtype)
        A, B = _autocast(A, B)
        return add_low_rank(y, x, A, B, scaling, self._groups, in_place=self._in_place)


def _forward_materialized(
    m: FusedExperts,
    name: str,
    x: Tensor,
    routing: Routing,
    adapters: Sequence[WeightAdapter],
    edits: Sequence[Edit],
    bias: Tensor | None,
    rows: Mapping[str, Tensor],
) -> Tensor:
    """W' [E, out, in] formed: for edits without a cheaper exact form."""
    site = adapters[0].site
    if rows:
        raise ValueError(
            f"{site.label}: expected edits that act on activations when rows of a batch are under "
            f"different adapters, got {adapters[0].method.label} on experts; run the adapters one "
            "after the other"
        )
    y = grouped_linear(x, apply_edits(site, edits).to(x.dtype), routing.groups)
    for e in edits:
        if e.bias is not None:
            extra = _by_pair(e.bias, routing)
            bias = extra if bias is None else bias + extra
        if bias is not None and e.scale_bias and e.out_scale is not None:
            bias = bias * _by_pair(e.out_scale, routing)
    return y if bias is None else y + bias.to(y.dtype)
