"""Projections that share their input (q, k and v; gate and up), each with LoRA, as one op.

    y_i = x W_iᵀ + s_i · drop_i(x) A_iᵀ B_iᵀ + bias_i          i = 1 … g, W_i [N_i, K] packed

The weights are dequantised below each other into one buffer [ΣN, K], so that forward is one product
and dX = [dY_1 … dY_g] · [W_1; …; W_g] one product too, instead of g products and g − 1 passes that
add into dX. Without dropout the A_i are stacked, so that x and dX meet one rank-sized product each;
with it every layer draws its own seed, in order, so that its mask is the one that it would draw
alone. Each y_i owns its columns of one [M, ΣN] buffer: a strided tensor, not a view.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft_kernels.autograd import (
    applied,
    autocast_off,
    gradients_of,
    recording,
    transformed,
)
from lightning_peft_kernels.dropout.ops import seeded_dropout
from lightning_peft_kernels.lora.linear import (
    Plan,
    lora_down,
    lora_up_backward,
    plain_branch,
    prepare,
    rank_backward,
)
from lightning_peft_kernels.nf4.linear import nf4_lora_linear, nf4_lora_linear_reference
from lightning_peft_kernels.nf4.ops import Packed4bit
from lightning_peft_kernels.nf4.weight_buffers import keeps_for_backward, stacked_weights

__all__ = ["Projection", "nf4_grouped_projections", "nf4_grouped_projections_reference"]


class Projection(NamedTuple):
    """One of the layers.

    Attributes:
        q: Bytes of W.
        shape: (N, K).
        bias: [N] or None.
        A: [R, K].
        B: [N, R].
        scaling: Number or 0-d tensor.
        dropout_p: Probability of dropping an element of x in the low-rank branch.
    """

    q: Packed4bit
    shape: tuple[int, int]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float | Tensor
    dropout_p: float = 0.0


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


class _Group(NamedTuple):
    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    plans: tuple[Plan, ...]
    kind: str
    block_size: int

    @property
    def rows(self) -> list[int]:
        return [N for N, _ in self.shapes]

    @property
    def stacked(self) -> bool:
        """Whether all A meet the same x."""
        return not any(plan.dropout_p for plan in self.plans)


def _packed(flat: Sequence[Tensor | None]) -> list[Packed4bit]:
    return [Packed4bit(*flat[i : i + 4]) for i in range(0, len(flat), 4)]  # type: ignore[arg-type]


def _down(
    x2: Tensor, As: Sequence[Tensor], group: _Group
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(S_i = s_i · drop_i(x) A_iᵀ, seeds)."""
    if not group.stacked:
        found = [lora_down(x2, A, plan) for A, plan in zip(As, group.plans, strict=True)]
        return [S for S, _ in found], [seed for _, seed in found]
    S = x2.to(group.plans[0].dtype) @ torch.cat(list(As)).mT
    parts = S.split(group.ranks, dim=1)
    scaled = [
        part if plan.scaling == 1.0 else part * plan.scaling
        for part, plan in zip(parts, group.plans, strict=True)
    ]
    return scaled, [None] * len(As)


def _up(
    x2: Tensor,
    W: Tensor,
    Ss: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    group: _Group,
) -> list[Tensor]:
    """y_i = S_i B_iᵀ + x W_iᵀ + bias_i, in that order, as a layer alone sums it."""
    branches = [S @ B.mT for S, B in zip(Ss, Bs, strict=True)]
    if torch.compiler.is_compiling():  # a graph knows no tensors that share memory unseen
        y = torch.cat([b.to(x2.dtype) for b in branches], 1).addmm(x2, W.mT)
        return [
            part.clone() if bias is None else part + bias
            for part, bias in zip(y.split(group.rows, 1), biases, strict=True)
        ]
    y = x2.new_empty(x2.shape[0], sum(group.rows))
    # Parts that autograd takes for tensors of their own: the caller may go on in place.
    parts: list[Tensor] = list(torch.ops.aten.unsafe_split_with_sizes(y, group.rows, 1))
    for part, branch in zip(parts, branches, strict=True):
        part.copy_(branch)
    y.addmm_(x2, W.mT)
    for part, bias in zip(parts, biases, strict=True):
        if bias is not None:
            part += bias
    return parts


class _GroupedProjections(torch.autograd.Function):
    """Inputs after `group`: g biases, g A, g B, then 4·g tensors of bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group, *rest: Any) -> tuple[Tensor, ...]:
        g, lead = len(group.shapes), x.shape[:-1]
        biases, As, Bs, flat = rest[:g], rest[g : 2 * g], rest[2 * g : 3 * g], rest[3 * g :]
        x2 = x.reshape(-1, x.shape[-1])
        Ss, seeds = _down(x2, As, group)
        keep = ctx.needs_input_grad[0] and keeps_for_backward()
        how = (group.shapes, x.dtype, group.kind, group.block_size)
        W = stacked_weights(_packed(flat), *how, keep=keep)
        parts = _up(x2, W, Ss, Bs, biases, group)
        ctx.save_for_backward(x, W if keep else None, *seeds, *Ss, *As, *Bs, *flat)
        ctx.group = group
        return tuple(torch.ops.aten._unsafe_view(part, (*lead, part.shape[-1])) for part in parts)

    @staticmethod
    def backward(ctx: Any, *dYs: Tensor) -> Any:
        group: _Group = ctx.group
        x, W, *rest = ctx.saved_tensors
        g, needs = len(group.shapes), ctx.needs_input_grad
        seeds, Ss, As, Bs, flat = (
            rest[:g], rest[g : 2 * g], rest[2 * g : 3 * g], rest[3 * g : 4 * g], rest[4 * g :],
        )  # fmt: skip
        plans, x2 = group.plans, x.reshape(-1, x.shape[-1])
        flat_dYs = [dY.reshape(-1, dY.shape[-1]) for dY in dYs]
        biases = [dY.sum(0) if needs[2 + i] else None for i, dY in enumerate(flat_dYs)]
        if needs[0] and (W is None or W.dtype != dYs[0].dtype):
            how = (group.shapes, dYs[0].dtype, group.kind, group.block_size)
            W = stacked_weights(_packed(flat), *how, keep=False)
        if recording():
            formula = functools.partial(_recorded, group, seeds, W if needs[0] else None)
            wanted = [needs[0], *needs[2 + g : 2 + 3 * g]]
            dX, *d_factors = gradients_of(formula, (x, *As, *Bs), wanted, dYs)
            return dX, None, *biases, *d_factors, *[None] * (4 * g)
        dSs, dBs = [], []
        each = zip(flat_dYs, Ss, As, Bs, plans, needs[2 + 2 * g :], strict=False)
        for dY, S, A, B, plan, needs_B in each:  # dA comes from the stacked dS, below
            dS, _, dB = rank_backward(dY, None, S, None, A, B, plan, False, needs_B, True)
            assert dS is not None  # asked for
            dSs.append(dS)
            dBs.append(dB)
        dAs = _down_backward(dSs, x2, seeds, group, needs[2 + g : 2 + 2 * g])
        dX = None
        if needs[0]:
            low = _up_backward(dSs, As, seeds, group)
            dX = torch.addmm(low.to(dYs[0].dtype), torch.cat(flat_dYs, 1), W)
            dX = dX.view(x.shape)
        return dX, None, *biases, *dAs, *dBs, *[None] * (4 * g)


def _recorded(
    group: _Group, seeds: Sequence[Tensor | None], W: Tensor | None, x: Tensor, *factors: Tensor
) -> list[Tensor]:
    """y_i without bias, in torch's own operations; without the base where no dX is asked for."""
    As, Bs = factors[: len(seeds)], factors[len(seeds) :]
    lows = [
        plain_branch(x, A, B, plan, seed)
        for A, B, seed, plan in zip(As, Bs, seeds, group.plans, strict=True)
    ]
    if W is None:
        return lows
    bases = torch.nn.functional.linear(x, W).split(group.rows, -1)
    return [low + base for low, base in zip(lows, bases, strict=True)]


def _down_backward(
    dSs: Sequence[Tensor],
    x2: Tensor,
    seeds: Sequence[Tensor | None],
    group: _Group,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dA_i = dS_iᵀ drop_i(x)."""
    if not any(needs):
        return [None] * len(dSs)
    z = x2.to(group.plans[0].dtype)
    if group.stacked:
        return list((torch.cat(list(dSs), 1).mT @ z).split(group.ranks))
    return [
        dS.mT @ (z if seed is None else seeded_dropout(z, seed, plan.dropout_p)) if need else None
        for dS, seed, plan, need in zip(dSs, seeds, group.plans, needs, strict=True)
    ]


def _up_backward(
    dSs: Sequence[Tensor], As: Sequence[Tensor], seeds: Sequence[Tensor | None], group: _Group
) -> Tensor:
    """Σ drop_i(dS_i A_i) [M, K]."""
    if group.stacked:
        return torch.cat(list(dSs), 1) @ torch.cat(list(As))
    parts = zip(dSs, As, seeds, group.plans, strict=True)
    low, *others = (lora_up_backward(dS, A, seed, plan) for dS, A, seed, plan in parts)
    for other in others:
        low = low + other
    return low


def nf4_grouped_projections(
    x: Tensor,
    layers: Sequence[Projection],
    *,
    kind: str = "nf4",
    block_size: int = 64,
    training: bool = True,
) -> list[Tensor]:
    """y_i [..., N_i] of every layer; differentiable in x and in every A, B and bias.

    Args:
        x: [..., K] floating.
        layers: At least one; all with the same K, with adapters of one dtype.
        kind: ``"nf4"`` or ``"fp4"``.
        block_size: As quantised.
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
    if transformed():
        how: dict[str, Any] = {"kind": kind, "block_size": block_size, "training": training}
        return [
            nf4_lora_linear(
                x, p.q, p.shape, p.bias, p.A, p.B, p.scaling, dropout_p=p.dropout_p, **how
            )
            for p in layers
        ]
    given = x
    prepared = []
    for p in layers:
        dropout = p.dropout_p if training else 0.0
        x, *tensors = prepare(given, p.A, p.B, p.bias, p.scaling, dropout)
        prepared.append(tensors)
    As, Bs, biases, plans = zip(*prepared, strict=True)
    group = _Group(
        tuple((N, K) for N, K in (p.shape for p in layers)),
        tuple(A.shape[0] for A in As),
        plans,
        kind,
        block_size,
    )
    flat = [t for layer in layers for t in layer.q]
    with autocast_off(x.device.type):
        ys = applied(_GroupedProjections, x, group, *biases, *As, *Bs, *flat)
    return list(ys)
