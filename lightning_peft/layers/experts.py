"""Fused experts: the weights of all experts of a layer as 3-D parameters, read by the module's own
forward.

The instance says what it is (transformers 5): `has_gate, has_bias, is_transposed, is_concatenated,
has_post_expert_norm, act_fn, _apply_gate`. One forward serves them all: token–expert pairs sorted
by expert, grouped products over the experts that have tokens, the module's own gate, biases, norm
and routing weights. Low rank runs on routed tokens only; ΔW [E, out, in] is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_peft_kernels.experts import grouped_linear
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.edit import Edit, LowRank
from lightning_peft.layers.adapted import Adapter
from lightning_peft.layers.matrix import MatrixOps
from lightning_peft.layers.rows import current_rows
from lightning_peft.swap import Swapped

__all__ = ["ExpertsOps", "QuantizedExperts", "is_experts", "run_experts"]


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a fused experts module that says what it is, or a known one that does
    not.
    """
    if _is_presorted(module):
        return True
    down = module._parameters.get("down_proj")
    first = module._parameters.get(_first(module)) if hasattr(module, "has_gate") else None
    return (
        down is not None
        and first is not None
        and hasattr(module, "is_transposed")
        and hasattr(module, "num_experts")
    )


def _is_presorted(module: nn.Module) -> bool:
    """Llama 4's experts: [E, in, out], gate and up concatenated, the input sorted by the caller
    with equally many rows an expert.
    """
    return any(c.__name__ == "Llama4TextExperts" for c in type(module).__mro__)


def is_transposed(m: Any) -> bool:
    """Whether the weights are stored [E, in, out]."""
    return True if _is_presorted(m) else bool(m.is_transposed)


def _first(m: Any) -> str:
    return "gate_up_proj" if _is_presorted(m) or m.has_gate else "up_proj"


def _has_bias(m: Any) -> bool:
    return not _is_presorted(m) and bool(m.has_bias)


class ExpertsOps(MatrixOps):
    """Canonical weights [E, out, in] of gate_up_proj (or up_proj) and down_proj."""

    def parameters(self, m: nn.Module) -> Sequence[str]:
        """In the order in which the module defines them."""
        wanted = {_first(m), "down_proj"}
        return tuple(n for n in m._parameters if n in wanted)

    def bias(self, m: Any, name: str) -> str | None:
        """[E, out], where there is one."""
        return f"{name}_bias" if _has_bias(m) else None

    def shape(self, m: Any, name: str, natural: torch.Size) -> torch.Size:
        """[E, out, in]."""
        return torch.Size((natural[0], natural[2], natural[1])) if is_transposed(m) else natural

    def to_matrix(self, m: Any, name: str, W: Tensor) -> Tensor:
        """A view."""
        return W.mT if is_transposed(m) else W

    def from_matrix(self, m: Any, name: str, M: Tensor) -> Tensor:
        """A view."""
        return M.mT if is_transposed(m) else M

    def scale_in_matrix(self, m: nn.Module, M: Tensor, scale: Tensor) -> Tensor:
        """M diag(scale), per expert where the scale is."""
        return M * scale.unsqueeze(-2)

    def forward(
        self,
        m: nn.Module,
        run: Callable[..., Any],
        adapters: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The experts' function with every edit on its weight."""
        return run_experts(m, adapters, (*args, *kwargs.values()))

    # ---- exchange: peft nests one wrapper a parameter, the first defined innermost

    def hf_by_parameter(self, m: nn.Module, name: str) -> bool:
        """Always: experts are parameters, not layers."""
        return True

    def hf_swaps(self, m: nn.Module, name: str) -> bool:
        """Llama 4's [E, in, out] does not say so: peft reads it as [E, out, in]."""
        return _is_presorted(m)

    def hf_places(self, m: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
        """Weight → path below the module; names alone do not say which parameter, the order
        does.
        """
        inside_out = [n for n in self.parameters(m) if n in adapted]
        depth = len(inside_out) - 1
        return {n: ".".join(["base_layer"] * (depth - i)) for i, n in enumerate(inside_out)}

    def hf_found(self, m: nn.Module, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        """Place → weight; a single place is told by its shape."""
        names = self.parameters(m)
        if len(found) == len(names):
            places = {place: name for name, place in self.hf_places(m, names).items()}
            if set(places) == set(found):
                return places
        if set(found) == {""}:
            for name in names:
                E, out, width = self.shape(m, name, _natural(m, name))
                if self.hf_swaps(m, name):
                    out, width = width, out
                shapes = {k: t.shape for k, t in found[""].items()}
                A = next((s for k, s in shapes.items() if "lora_A" in k), None)
                B = next((s for k, s in shapes.items() if "lora_B" in k), None)
                if (
                    A is not None
                    and B is not None
                    and A[1] == width
                    and B[0] == out
                    and A[0] % E == 0
                ):
                    return {"": name}
        raise ValueError(
            f"{type(m).__name__}: expected tensors of {list(names)} at "
            f"{list(self.hf_places(m, names).values())}, got places {sorted(found)} whose shapes "
            "fit none of them"
        )

    def hf_rank(self, m: nn.Module, name: str, r: int) -> int:
        """As ours: one rank an expert."""
        return r

    def hf_pack(self, m: nn.Module, name: str, layout: str, t: Tensor) -> Tensor:
        """A [E, r, in] → [E·r, in] expert-major; B [E, out, r] → [out, r·E] rank-major."""
        if t.ndim == 2:  # one adapter shared over experts: repeat it
            t = t.expand(int(m.num_experts), *t.shape)  # type: ignore[arg-type]
        if layout == "down":
            return t.reshape(-1, t.shape[-1])
        return t.permute(1, 2, 0).reshape(t.shape[1], -1) if layout == "up" else t

    def hf_unpack(self, m: Any, name: str, layout: str, t: Tensor) -> Tensor:
        """Inverse of `hf_pack`."""
        E = m.num_experts
        if t.ndim != 2 or t.shape[0 if layout == "down" else 1] % E:
            raise ValueError(
                f"expected a matrix whose rank axis is a multiple of {E} experts, got "
                f"{list(t.shape)}"
            )
        if layout == "down":
            return t.reshape(E, -1, t.shape[1])
        return t.reshape(t.shape[0], -1, E).permute(2, 0, 1)


def _natural(m: Any, name: str) -> torch.Size:
    packing = (vars(m).get("_packed") or {}).get(name)
    if packing is None:
        shape: torch.Size = m._parameters[name].shape
        return shape
    E, out, width = packing.shape
    return torch.Size((E, width, out)) if packing.transposed else torch.Size((E, out, width))


class QuantizedExperts(Swapped):
    """Mixin: fused experts whose weights are packed, expert by expert."""

    _swap_prefix = "NF4"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' function over packed weights."""
        module: Any = self
        return run_experts(module, (), (*args, *kwargs.values()))


class _Routing:
    """Token–expert pairs sorted by expert.

    Attributes:
        token: [S] row of the input that each pair reads.
        expert: [S] its expert, sentinels clamped.
        counts: Pairs of each expert.
        inverse: [S] where each pair goes back to.
        weight: [S] routing weights.
        valid: [S, 1] False for sentinels, None where there are none.
    """

    def __init__(self, m: Any, index: Tensor, weights: Tensor) -> None:
        flat = index.reshape(-1)
        expert, order = torch.sort(flat, stable=True)
        self.token = order // index.shape[-1]
        self.valid = None
        E = m.num_experts
        if getattr(m, "_is_expert_parallel", False):
            self.valid = (expert < E).unsqueeze(-1)
        self.counts: list[int] = torch.bincount(expert, minlength=E)[:E].tolist()
        self.expert = expert.clamp(max=E - 1)
        self.inverse = torch.empty_like(order)
        self.inverse[order] = torch.arange(order.numel(), device=order.device)
        self.weight = weights.reshape(-1)[order]


def run_experts(m: Any, adapters: Sequence[Adapter], inputs: tuple[Any, ...]) -> Tensor:
    """Forward of a fused experts module.

    Args:
        m: The module.
        adapters: Active adapters of its weights, in order.
        inputs: (hidden states [T, d], expert indices [T, k], routing weights [T, k]); hidden states
            alone where they come sorted.
    """
    by_weight: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        by_weight.setdefault(adapter.site.parameter, []).append(adapter)
    if _is_presorted(m):
        return _run_presorted(m, by_weight, inputs[0])
    x, index, weights = inputs[:3]
    routing = _Routing(m, index, weights)
    rows = _mask_of_rows(adapters, x.shape[0], routing)
    first = _first(m)
    h = x[routing.token]
    if routing.valid is not None:
        h = h.masked_fill(~routing.valid, 0.0)
    h = _product(m, first, h, routing, by_weight.get(first, ()), rows)
    h = m._apply_gate(h) if m.has_gate else m.act_fn(h)
    h = _product(m, "down_proj", h, routing, by_weight.get("down_proj", ()), rows)
    if routing.valid is not None:
        h = h.masked_fill(~routing.valid, 0.0)
    if m.has_post_expert_norm:
        h = m.post_expert_norm(h)
    h = (h * routing.weight.unsqueeze(-1))[routing.inverse]
    y: Tensor = h.view(x.shape[0], -1, h.shape[-1]).sum(dim=1).to(x.dtype)
    return y


class _Presorted(_Routing):
    """As many rows for each expert, in order."""

    def __init__(self, m: Any, rows: int) -> None:
        each = rows // m.num_experts
        self.counts = [each] * m.num_experts
        device = m.down_proj.device
        self.expert = torch.arange(m.num_experts, device=device).repeat_interleave(each)
        self.token = torch.arange(rows, device=device)


def _run_presorted(m: Any, by_weight: Mapping[str, Sequence[Adapter]], x: Tensor) -> Tensor:
    h = x.reshape(-1, x.shape[-1])
    routing = _Presorted(m, h.shape[0])
    if by_weight and current_rows() is not None:
        raise ValueError(
            f"{type(m).__name__}: expected one adapter for all rows of the batch, got "
            "adapter_names: its input is sorted by expert; run the adapters one after the other"
        )
    gate, up = _product(m, "gate_up_proj", h, routing, by_weight.get("gate_up_proj", ()), {}).chunk(
        2, dim=-1
    )
    h = up * m.act_fn(gate)
    return _product(m, "down_proj", h, routing, by_weight.get("down_proj", ()), {})


def _mask_of_rows(adapters: Sequence[Adapter], tokens: int, routing: _Routing) -> dict[str, Tensor]:
    """Adapter name → [S, 1] whether a pair's token is under it; empty where all rows are alike."""
    mix = current_rows()
    if mix is None:
        return {}
    masks = {}
    for name in {a.adapter_name for a in adapters}:
        mask = torch.zeros(tokens, 1, dtype=torch.bool, device=routing.token.device)
        mask[mix.index(name, tokens, mask.device)] = True
        masks[name] = mask[routing.token]
    return masks


def _product(
    m: Any,
    name: str,
    x: Tensor,
    routing: _Routing,
    adapters: Sequence[Adapter],
    rows: Mapping[str, Tensor],
) -> Tensor:
    """One grouped linear layer with its edits: an onion around one base product."""
    edits = [a.edit() for a in adapters]
    masks = [rows.get(a.adapter_name) for a in adapters]
    bias = getattr(m, f"{name}_bias")[routing.expert] if _has_bias(m) else None
    if any(e.rotation is not None or not _thin(e) for e in edits):
        return _weight_path(m, name, x, routing, adapters, edits, bias, rows)
    inputs = [x] * len(edits)
    for i in reversed(range(len(edits))):
        scale = edits[i].in_scale
        if scale is not None:
            x = _where(masks[i], x * _by_pair(scale, routing).to(x.dtype), x)
        inputs[i] = x
    y = _base(m, name, x, routing)
    if bias is not None:
        y = y + bias.to(y.dtype)
    for e, z, mask in zip(edits, inputs, masks, strict=True):
        v = y
        keep = bias if e.out_scale is not None and not e.scale_bias else None
        if keep is not None:
            v = v - keep
        for term in e.terms:
            assert isinstance(term, LowRank)
            drop = F.dropout(z, e.dropout, m.training) if e.dropout and m.training else z
            v = v + _low_rank(term, drop, routing).to(v.dtype)
        if e.bias is not None and (e.scale_bias or e.out_scale is None):
            v = v + _by_pair(e.bias, routing).to(v.dtype)
        if e.out_scale is not None:
            v = v * _by_pair(e.out_scale, routing).to(v.dtype)
        if keep is not None:
            v = v + keep
        y = _where(mask, v, y)
    return y


def _thin(edit: Edit) -> bool:
    return all(isinstance(t, LowRank) for t in edit.terms)


def _where(mask: Tensor | None, yes: Tensor, no: Tensor) -> Tensor:
    return yes if mask is None else torch.where(mask, yes, no)


def _by_pair(v: Tensor, routing: _Routing) -> Tensor:
    """[E, n] → [S, n]; a vector shared by all experts stays."""
    return v[routing.expert] if v.ndim == 2 else v


def _base(m: Any, name: str, x: Tensor, routing: _Routing) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    packing = (vars(m).get("_packed") or {}).get(name)
    if packing is not None:
        y: Tensor = packing.grouped_linear(m, name, x, routing.counts)
        return y
    W = getattr(m, name)
    return grouped_linear(x, (W.mT if is_transposed(m) else W).to(x.dtype), routing.counts)


def _low_rank(term: LowRank, x: Tensor, routing: _Routing) -> Tensor:
    """scaling · B[e] A[e] x, two thin grouped products; or one pair A, B for all experts."""
    A, B = term.A, term.B
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        A, B = A.to(dtype), B.to(dtype)
    x = x.to(A.dtype)
    if A.ndim == 2:
        return F.linear(F.linear(x, A) * term.scaling, B)
    return grouped_linear(grouped_linear(x, A, routing.counts) * term.scaling, B, routing.counts)


def _weight_path(
    m: Any,
    name: str,
    x: Tensor,
    routing: _Routing,
    adapters: Sequence[Adapter],
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
    y = grouped_linear(x, site.edited(edits).to(x.dtype), routing.counts)
    for e in edits:
        if e.bias is not None:
            extra = _by_pair(e.bias, routing)
            bias = extra if bias is None else bias + extra
        if bias is not None and e.scale_bias and e.out_scale is not None:
            bias = bias * _by_pair(e.out_scale, routing)
    return y if bias is None else y + bias.to(y.dtype)
