"""Projections that share their input (q, k and v; gate and up), each with LoRA, as one op.

    y_i = x W_iᵀ + s_i · drop(x) A_iᵀ B_iᵀ + bias_i          i = 1 … g, W_i [N_i, K] packed

The weights are dequantised below each other into one buffer [ΣN, K], so that forward is one product
and dX = [dY_1 … dY_g] · [W_1; …; W_g] one product too, instead of g products and g − 1 passes that
add into dX; the A_i are stacked, so that x and dX meet one rank-sized product each. The outputs are
views of one [M, ΣN] tensor. Dropout draws one mask for the group, where separate layers draw their
own: leave a group apart where its members' masks must differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.lora_linear import Plan, prepare
from lightning_peft_kernels.nf4 import Packed4bit, dequantize_4bit
from lightning_peft_kernels.nf4_lora_linear import nf4_lora_linear_reference

__all__ = ["Projection", "nf4_grouped_projections", "nf4_grouped_projections_reference"]


class Projection(NamedTuple):
    """One of the layers.

    Attributes:
        q: Bytes of W.
        shape: (N, K).
        bias: [N] or None.
        A: [R, K].
        B: [N, R].
        scaling: A number.
    """

    q: Packed4bit
    shape: tuple[int, int]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float


def nf4_grouped_projections_reference(
    x: Tensor, layers: Sequence[Projection], *, kind: str = "nf4", block_size: int = 64
) -> list[Tensor]:
    """One layer after the other, without dropout."""
    return [
        nf4_lora_linear_reference(
            x, p.q, p.shape, p.bias, p.A, p.B, p.scaling, kind=kind, block_size=block_size
        )
        for p in layers
    ]


class _Sizes(NamedTuple):
    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    plan: Plan
    kind: str
    block_size: int


def _dense(packed: Sequence[Packed4bit], sizes: _Sizes, dtype: torch.dtype) -> Tensor:
    """[ΣN, K]; each weight is written to its own rows."""
    rows = [N for N, _ in sizes.shapes]
    K = sizes.shapes[0][1]
    how: dict[str, Any] = {"kind": sizes.kind, "block_size": sizes.block_size}
    if torch.compiler.is_compiling():
        parts = zip(packed, sizes.shapes, strict=True)
        return torch.cat([dequantize_4bit(q, shape, dtype, **how) for q, shape in parts])
    W = torch.empty(sum(rows), K, dtype=dtype, device=packed[0].packed.device)
    for q, part, shape in zip(packed, W.split(rows), sizes.shapes, strict=True):
        dequantize_4bit(q, shape, dtype, out=part, **how)
    return W


def _packed(flat: Sequence[Tensor | None]) -> list[Packed4bit]:
    return [Packed4bit(*flat[i : i + 4]) for i in range(0, len(flat), 4)]  # type: ignore[arg-type]


class _GroupedProjections(torch.autograd.Function):
    """Inputs after `sizes`: g biases, g A, g B, then 4·g tensors of bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: _Sizes, *rest: Tensor | None) -> Tensor:
        g = len(sizes.shapes)
        biases, As, Bs, flat = rest[:g], rest[g : 2 * g], rest[2 * g : 3 * g], rest[3 * g :]
        plan = sizes.plan
        x2 = x.reshape(-1, x.shape[-1])
        z, mask = x2.to(plan.dtype), None
        if plan.dropout_p:
            keep = 1.0 - plan.dropout_p
            mask = torch.rand(x2.shape, device=x2.device, dtype=torch.float32) < keep
            z = z * mask * (1.0 / keep)
        S = z @ torch.cat(As).mT  # type: ignore[arg-type]
        y = x2.new_empty(x2.shape[0], sum(N for N, _ in sizes.shapes))
        parts = y.split([N for N, _ in sizes.shapes], dim=1)
        for part, s, B, scaling, bias in zip(
            parts, S.split(sizes.ranks, dim=1), Bs, sizes.scalings, biases, strict=True
        ):
            assert B is not None
            s.mul_(scaling)
            part.copy_(s @ B.mT)
            if bias is not None:
                part += bias
        y.addmm_(x2, _dense(_packed(flat), sizes, x.dtype).mT)
        ctx.save_for_backward(x2, mask, S, *As, *Bs, *flat)
        ctx.sizes, ctx.leading = sizes, x.shape[:-1]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        sizes: _Sizes = ctx.sizes
        x2, mask, S, *rest = ctx.saved_tensors
        g, plan, needs = len(sizes.shapes), sizes.plan, ctx.needs_input_grad
        As, Bs, flat = rest[:g], rest[g : 2 * g], rest[2 * g :]
        dY2 = dY.reshape(-1, dY.shape[-1])
        gs = dY2.to(plan.dtype).split([N for N, _ in sizes.shapes], dim=1)
        factor = 1.0 / (1.0 - plan.dropout_p)
        dS = torch.cat(
            [part @ B * s for part, B, s in zip(gs, Bs, sizes.scalings, strict=True)], dim=1
        )
        dBs = [
            part.mT @ s if needs[2 + 2 * g + i] else None
            for i, (part, s) in enumerate(zip(gs, S.split(sizes.ranks, dim=1), strict=True))
        ]
        dAs: list[Tensor | None] = [None] * g
        if any(needs[2 + g : 2 + 2 * g]):
            z = x2.to(plan.dtype)
            dAs = list((dS.mT @ (z if mask is None else z * mask * factor)).split(sizes.ranks))
        biases = [
            part.sum(0) if needs[2 + i] else None
            for i, part in enumerate(dY2.split([N for N, _ in sizes.shapes], dim=1))
        ]
        dX = None
        if needs[0]:
            low = dS @ torch.cat(As)
            low = low if mask is None else low * mask * factor
            W = _dense(_packed(flat), sizes, dY.dtype)
            dX = torch.addmm(low.to(dY.dtype), dY2, W).view(*ctx.leading, x2.shape[1])
        return dX, None, *biases, *dAs, *dBs, *[None] * (4 * g)


def nf4_grouped_projections(
    x: Tensor,
    layers: Sequence[Projection],
    *,
    kind: str = "nf4",
    block_size: int = 64,
    dropout_p: float = 0.0,
    training: bool = True,
) -> list[Tensor]:
    """y_i [..., N_i] of every layer; differentiable in x and in every A, B and bias.

    Args:
        x: [..., K] floating.
        layers: At least one; all with the same K, with adapters of one dtype.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: As quantised.
        dropout_p: Probability of dropping an element of x in the low-rank branches.
        training: Whether dropout is on.

    Raises:
        ValueError: layers whose K or adapters' dtypes differ.
    """
    widths = {p.shape[1] for p in layers} | {x.shape[-1]}
    dtypes = {p.A.dtype for p in layers} | {p.B.dtype for p in layers}
    if len(widths) > 1 or len(dtypes) > 1:
        raise ValueError(
            "nf4_grouped_projections: expected one input width and one adapter dtype, got widths "
            f"{sorted(widths)} and {sorted(map(str, dtypes))}; run these layers one by one"
        )
    p = dropout_p if training else 0.0
    As, Bs, biases = [], [], []
    given = x
    for layer in layers:
        x, A, B, bias, plan = prepare(given, layer.A, layer.B, layer.bias, 1.0, p)
        As.append(A)
        Bs.append(B)
        biases.append(bias)
    sizes = _Sizes(
        tuple(tuple(layer.shape) for layer in layers),  # type: ignore[misc]
        tuple(A.shape[0] for A in As),
        tuple(layer.scaling for layer in layers),
        plan,
        kind,
        block_size,
    )
    flat = [t for layer in layers for t in layer.q]
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _GroupedProjections.apply(x, sizes, *biases, *As, *Bs, *flat)  # type: ignore[no-untyped-call]
    return list(y.split([N for N, _ in sizes.shapes], dim=-1))
